// Java's own HTTP client as it is by default: on a connection without TLS it offers HTTP/2 at the
// first request. Arguments: host:port, model, a JSON head and its binary tensor, expected labels.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.stream.Collectors;

public class JavaClient {
  static final HttpClient CLIENT = HttpClient.newHttpClient();
  static String base;

  static HttpRequest.Builder to(String path) {
    return HttpRequest.newBuilder(URI.create(base + path));
  }

  static String get(String path, String expected) throws Exception {
    HttpResponse<String> answer = CLIENT.send(to(path).build(), BodyHandlers.ofString());
    boolean right = answer.statusCode() == 200 && answer.body().contains(expected);
    return right ? "ok" : answer.statusCode() + " " + answer.body();
  }

  public static void main(String[] given) throws Exception {
    base = "http://" + given[0];
    String model = "/v2/models/" + given[1];
    byte[] head = Files.readAllBytes(Path.of(given[2]));
    byte[] tensor = Files.readAllBytes(Path.of(given[3]));
    byte[] labels = Files.readAllBytes(Path.of(given[4]));
    Map<String, String> cells = new LinkedHashMap<>();
    cells.put("health", get("/v2/health/ready", "true"));
    cells.put("metadata", get(model, "\"images\""));

    byte[] body = Arrays.copyOf(head, head.length + tensor.length);
    System.arraycopy(tensor, 0, body, head.length, tensor.length);
    // The first request of a connection of its own carries the body with the offer of HTTP/2.
    for (HttpClient client : new HttpClient[] {CLIENT, HttpClient.newHttpClient()}) {
      HttpRequest infer =
          to(model + "/infer")
              .header("Inference-Header-Content-Length", String.valueOf(head.length))
              .POST(HttpRequest.BodyPublishers.ofByteArray(body))
              .build();
      HttpResponse<byte[]> answer = client.send(infer, BodyHandlers.ofByteArray());
      int length = answer.body().length;
      byte[] found = Arrays.copyOfRange(answer.body(), Math.max(length - labels.length, 0), length);
      boolean right = answer.statusCode() == 200 && Arrays.equals(found, labels);
      cells.put("infer", right ? "ok" : answer.statusCode() + " and other labels");
      if (!right) break;
    }
    cells.put("config", get(model + "/config", "max_batch_size"));
    cells.put("statistics", get(model + "/stats", "inference_count"));
    String values =
        cells.entrySet().stream()
            .map(cell -> quoted(cell.getKey()) + ": " + quoted(cell.getValue()))
            .collect(Collectors.joining(", "));
    String version = System.getProperty("java.version");
    System.out.println("{\"version\": " + quoted(version) + ", \"cells\": {" + values + "}}");
  }

  static String quoted(String text) {
    return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", " ") + '"';
  }
}
