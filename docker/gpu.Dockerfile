# The service on an NVIDIA GPU. Build from the repository's root:
#   docker build -f docker/gpu.Dockerfile -t fdconv-deploy:gpu .
# No GPU has run it yet. CUDA and cuDNN come with the extra gpu, the driver from the
# host (NVIDIA's container toolkit).
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fdconv_deploy fdconv_deploy
COPY serve serve
COPY export export
RUN python -m venv /opt/fdconv \
    && /opt/fdconv/bin/pip install --no-cache-dir '.[gpu,serve,grpc,tracing]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/fdconv /opt/fdconv
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fdconv
USER 10001
ENV PATH=/opt/fdconv/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000 8001
# Bundles are mounted, never baked in: /models holds one folder each.
VOLUME /models
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fdconv", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/models", "--reload-seconds", "5", "--log-format", "json", "--batch-delay-ms", "2"]
