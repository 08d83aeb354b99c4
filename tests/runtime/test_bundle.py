from __future__ import annotations

import json
import os
import re
from pathlib import Path

import onnx
import pytest

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle, Manifest
from fdconv_deploy.runtime.bundle import sha256_of
from fdconv_deploy.runtime.manifest import FORMAT_VERSION, OutputParity


def edit(bundle: Path, change) -> None:
    file = bundle / "manifest.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def relist(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file again, as whoever forges a bundle would."""
    file = bundle / name
    info = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    edit(bundle, lambda m: m["files"].__setitem__(name, info))


def refusal(bundle: Path, **options) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_round_trip(toy_bundle: Path) -> None:
    bundle = Bundle.open(toy_bundle)
    manifest = bundle.manifest
    assert bundle.batch_sizes == (1, 4)
    assert manifest.format_version == FORMAT_VERSION
    assert set(manifest.files) == {"model.b1.onnx", "model.b4.onnx", "weights.bin"}
    assert manifest.files["weights.bin"].bytes == (toy_bundle / "weights.bin").stat().st_size
    assert manifest.architecture is not None
    assert manifest.architecture.decode_head.num_classes == 5
    assert manifest.parity is not None
    assert manifest.parity.max_rel == 1e-7
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert bundle.model_path(4) == (toy_bundle / "model.b4.onnx").resolve()


def test_unknown_files_are_left_alone(bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    (bundle_copy / "away").symlink_to("/etc")
    assert "notes.txt" not in Bundle.open(bundle_copy).manifest.files


def test_a_link_to_the_bundle_folder_opens(toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy_bundle)
    assert Bundle.open(tmp_path / "link").batch_sizes == (1, 4)


@pytest.mark.parametrize("name", ["model.b1.onnx", "model.b4.onnx", "manifest.json"])
def test_a_file_of_the_bundle_opens_it(toy_bundle: Path, name: str) -> None:
    assert Bundle.open(toy_bundle / name).path == toy_bundle


class TestRefused:
    def test_missing_folder(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "none")

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").write_bytes(b"x")
        assert "is a file" in refusal(tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("net.pth", "Export it first"),
            ("net.safetensors", "Export it first"),
            ("last.ckpt", "Export it first"),
            ("street.jpg", "The bundle comes first, then the images"),
            ("model.onnx", "no manifest.json lies beside it"),
            ("weights.bin", "Give the folder that holds manifest.json"),
        ],
    )
    def test_another_file(self, tmp_path: Path, name: str, remedy: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        assert remedy in refusal(tmp_path / name)

    def test_no_manifest(self, tmp_path: Path) -> None:
        assert "has no manifest.json" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "7", "null", '"x"', "{}", "\x00", "[" * 100_000, '{"format_version": 1}'],
    )
    def test_manifest_not_one(self, bundle_copy: Path, text: str) -> None:
        (bundle_copy / "manifest.json").write_text(text)
        assert "manifest.json" in refusal(bundle_copy)

    def test_manifest_not_text(self, bundle_copy: Path) -> None:
        (bundle_copy / "manifest.json").write_bytes(b"\xff\xfe{}")
        assert "cannot be read" in refusal(bundle_copy)

    def test_manifest_of_gigabytes(self, bundle_copy: Path) -> None:
        with (bundle_copy / "manifest.json").open("r+b") as file:
            file.truncate(1 << 32)  # sparse: it takes no room, and would take 4 GiB to read
        assert "is too large" in refusal(bundle_copy)

    def test_newer_format(self, bundle_copy: Path) -> None:
        newer = FORMAT_VERSION + 1
        edit(bundle_copy, lambda m: m.update(format_version=newer, later={"x": 1}))
        text = refusal(bundle_copy)
        assert f"format {newer}" in text
        assert "Update fdconv-deploy" in text

    def test_the_first_format_is_read(self, bundle_copy: Path) -> None:
        def as_first(manifest: dict) -> None:
            manifest.update(format_version=1)
            del manifest["detector"]

        edit(bundle_copy, as_first)
        assert Bundle.open(bundle_copy).manifest.format_version == 1

    @pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, None])
    def test_format_not_a_number(self, bundle_copy: Path, version) -> None:
        edit(bundle_copy, lambda m: m.update(format_version=version))
        assert "format version" in refusal(bundle_copy)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda m: m.update(surprise=1), "surprise"),
            (lambda m: m.update(models={}), "models"),
            (lambda m: m.update(models={"0": "model.b1.onnx"}), "models"),
            (lambda m: m.update(kind="oracle"), "kind"),
            (lambda m: m.update(kind="detector"), "'detector' and 'input'"),
            (lambda m: m.update(architecture=None), "architecture"),
            (lambda m: m.update(input={"height": 16, "width": 48}), "images"),
            (lambda m: m["inputs"]["1"].append(dict(m["inputs"]["1"][0])), "must take images"),
            (lambda m: m.update(outputs={"1": []}), "same batch sizes"),
            (lambda m: m["outputs"].__setitem__("4", []), "found none"),
            (lambda m: m["outputs"]["4"][0].update(shape=[4, 6, 8, 12]), r"\(4, 5, any, any\)"),
            (lambda m: m["outputs"]["4"][0].update(dtype=""), "outputs.4.0.dtype"),
            (lambda m: m["inputs"]["1"][0].update(dtype="f@oat32"), "inputs.1.0.dtype"),
            (lambda m: m["inputs"]["1"][0].update(dtype="object"), "inputs.1.0.dtype"),
            (lambda m: m["architecture"].update(classes=["a", "b"]), "2 class names"),
            (lambda m: m["architecture"].update(palette=[[1, 2, 3]]), "1 palette colours"),
            (lambda m: m["architecture"].update(palette=[[1, 2, 256]] * 5), "palette.0.2"),
            (lambda m: m["architecture"].update(palette=[[1, -1, 2**31]] * 5), "palette.0.1"),
            (lambda m: m["files"]["weights.bin"].update(sha256="00"), "sha256"),
            (lambda m: m["parity"]["batches"]["1"][0].update(max_abs=float("nan")), "max_abs"),
        ],
    )
    def test_inconsistent_manifest(self, bundle_copy: Path, change, says: str) -> None:
        edit(bundle_copy, change)
        assert re.search(says, refusal(bundle_copy))

    @pytest.mark.parametrize("name", ["weights.bin", "model.b1.onnx", "model.b4.onnx"])
    def test_missing_file(self, bundle_copy: Path, name: str) -> None:
        (bundle_copy / name).unlink()
        assert f"lacks the file '{name}'" in refusal(bundle_copy)
        assert name in refusal(bundle_copy, verify=False)

    @pytest.mark.parametrize("name", ["weights.bin", "model.b1.onnx", "model.b4.onnx"])
    @pytest.mark.parametrize("position", [0, -1])
    def test_changed_byte(self, bundle_copy: Path, name: str, position: int) -> None:
        data = bytearray((bundle_copy / name).read_bytes())
        data[position] ^= 1
        (bundle_copy / name).write_bytes(data)
        text = refusal(bundle_copy)
        assert name in text
        assert "sha256 differs" in text

    @pytest.mark.parametrize("cut", [0, 1, 100])
    def test_cut_off_file_even_unverified(self, bundle_copy: Path, cut: int) -> None:
        file = bundle_copy / "weights.bin"
        file.write_bytes(file.read_bytes()[:cut])
        assert f"has {cut} bytes" in refusal(bundle_copy, verify=False)

    @pytest.mark.parametrize(
        "name",
        [
            "/etc/passwd",
            "../outside.bin",
            "a/../../outside.bin",
            "",
            "C:\\x",
            "\\x",
            "..\\o",
            "a\0b",
        ],
    )
    @pytest.mark.parametrize("verify", [True, False])
    def test_path_that_leads_outside(self, bundle_copy: Path, name: str, verify: bool) -> None:
        outside = bundle_copy.parent / "outside.bin"
        outside.write_bytes(b"secret")
        info = {"sha256": sha256_of(outside), "bytes": 6}
        edit(bundle_copy, lambda m: m["files"].__setitem__(name, info))
        assert "leads outside" in refusal(bundle_copy, verify=verify)

    @pytest.mark.parametrize("place", ["models", "weights"])
    def test_unlisted_path_that_leads_outside(self, bundle_copy: Path, place: str) -> None:
        (bundle_copy.parent / "outside.bin").write_bytes(b"secret")
        value = {"1": "../outside.bin", "4": "model.b4.onnx"}
        edit(bundle_copy, lambda m: m.update({place: value if place == "models" else value["1"]}))
        assert "leads outside" in refusal(bundle_copy)

    def test_link_to_outside(self, bundle_copy: Path) -> None:
        weights = bundle_copy / "weights.bin"
        outside = bundle_copy.parent / "same.bin"
        outside.write_bytes(weights.read_bytes())  # the hash even matches
        weights.unlink()
        weights.symlink_to(outside)
        assert "link that leads outside" in refusal(bundle_copy)

    def test_linked_folder_to_outside(self, bundle_copy: Path) -> None:
        outside = bundle_copy.parent / "there"
        outside.mkdir()
        (outside / "x.bin").write_bytes(b"")
        (bundle_copy / "sub").symlink_to(outside)
        relist(bundle_copy, "sub/x.bin")
        assert "link that leads outside" in refusal(bundle_copy)

    def test_manifest_that_is_a_link_to_outside(self, bundle_copy: Path) -> None:
        manifest = bundle_copy / "manifest.json"
        manifest.rename(bundle_copy.parent / "m.json")
        manifest.symlink_to(bundle_copy.parent / "m.json")
        assert "link that leads outside" in refusal(bundle_copy)

    def test_link_loop(self, bundle_copy: Path) -> None:
        (bundle_copy / "weights.bin").unlink()
        (bundle_copy / "weights.bin").symlink_to("weights.bin")
        assert "weights.bin" in refusal(bundle_copy)

    def test_named_pipe_does_not_hang(self, bundle_copy: Path) -> None:
        (bundle_copy / "weights.bin").unlink()
        os.mkfifo(bundle_copy / "weights.bin")
        assert "is not a file" in refusal(bundle_copy)

    @pytest.mark.parametrize("location", ["/etc/passwd", "../outside.bin", "x/../../outside.bin"])
    def test_external_data_outside(self, bundle_copy: Path, location: str) -> None:
        (bundle_copy.parent / "outside.bin").write_bytes(bytes(4096))
        self._point_weights_at(bundle_copy, location)
        assert "leads outside" in refusal(bundle_copy, verify=False)

    def test_external_data_unlisted(self, bundle_copy: Path) -> None:
        (bundle_copy / "other.bin").write_bytes((bundle_copy / "weights.bin").read_bytes())
        self._point_weights_at(bundle_copy, "other.bin")
        assert "does not list" in refusal(bundle_copy)

    def test_external_data_missing(self, bundle_copy: Path) -> None:
        self._point_weights_at(bundle_copy, "other.bin")
        assert "lacks the file 'other.bin'" in refusal(bundle_copy)

    def _point_weights_at(self, bundle: Path, location: str) -> None:
        file = bundle / "model.b1.onnx"
        model = onnx.load(str(file), load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        file.write_bytes(model.SerializeToString())
        relist(bundle, "model.b1.onnx")

    def test_graph_that_is_not_onnx(self, bundle_copy: Path) -> None:
        (bundle_copy / "model.b1.onnx").write_bytes(b"not a graph at all")
        relist(bundle_copy, "model.b1.onnx")
        assert "not an ONNX graph" in refusal(bundle_copy)

    def test_weights_not_listed(self, bundle_copy: Path) -> None:
        edit(bundle_copy, lambda m: m["files"].pop("weights.bin"))
        assert "does not list" in refusal(bundle_copy)


def test_a_parity_that_is_not_a_number_is_no_parity() -> None:
    with pytest.raises(ValueError):
        OutputParity(name="logits", max_abs=float("nan"), max_rel=0)
