"""Which back end a path gets, and the ones beside native InternVL: endpoint, hub, generic, remote code."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http import HTTPStatus
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

from tests.support import awq
from tests.support.golden import GOLDEN_VLM
from tests.support.tiny_checkpoint import InternVL, write_internvl
from wan.captioner import (
    EndpointCaptioner,
    GenericCaptioner,
    InternVLCaptioner,
    RemoteCodeCaptioner,
    dynamic_preprocess,
    endpoint,
    factory,
    hide_broken_torchvision,
    open_captioner,
)
from wan.captioner.base import BackEnd, LocalModel, foreseen_failures, one_line, reading, to_images
from wan.captioner.factory import local_folder, weight_bytes
from wan.captioner.frames import closest_grid
from wan.captioner.internvl import weight_files
from wan.errors import UserError
from wan.media import decord_worker
from wan.prompting import CaptionerOwner

FRAMES = np.arange(2 * 30 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 30, 50, 3)


def folder_with(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_config_json_picks_the_back_end(tmp_path: Path) -> None:
    assert isinstance(open_captioner(GOLDEN_VLM / "orig", device="cpu"), InternVLCaptioner)
    assert isinstance(open_captioner(GOLDEN_VLM / "hf", device="cpu"), InternVLCaptioner)
    assert isinstance(open_captioner(GOLDEN_VLM / "hf", device="cpu", trust_remote_code=True), InternVLCaptioner)
    assert isinstance(open_captioner(GOLDEN_VLM / "orig", device="cpu", trust_remote_code=True), RemoteCodeCaptioner)
    assert isinstance(open_captioner(folder_with(tmp_path, model_type="qwen3_vl"), device="cpu"), GenericCaptioner)
    assert isinstance(open_captioner(None, url="http://127.0.0.1:1/v1", device="cpu"), EndpointCaptioner)


NEEDED = {"awq": ["gptqmodel"], "gptq": ["gptqmodel", "optimum"], "bitsandbytes": ["bitsandbytes"]}


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("model_type", ["internvl_chat", "internvl", "qwen3_vl"])
def test_a_quantised_vlm_needs_its_packages_before_anything_loads(
    method: str, inside: bool, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: set[str] = set()
    monkeypatch.setattr("wan.captioner.factory.find_spec", lambda name: name if name in installed else None)
    declared = {"quantization_config": {"quant_method": method, "bits": 4}}
    config = {"text_config" if model_type == "qwen3_vl" else "llm_config": declared} if inside else declared
    folder = folder_with(tmp_path, model_type=model_type, auto_map={}, **config)
    for number, package in enumerate(NEEDED[method]):
        missing = " and ".join(NEEDED[method][number:])
        for own_code in (False, True):
            with pytest.raises(UserError, match=rf"is quantised \({method}\): install {missing}, or give") as caught:
                open_captioner(folder, device="cpu", trust_remote_code=own_code)
            assert "\n" not in str(caught.value)
        installed.add(package)


def test_a_quantisation_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    for model_type in ("internvl", "qwen3_vl"):
        folder = folder_with(tmp_path, model_type=model_type, quantization_config={"quant_method": "vptq"})
        with pytest.raises(UserError, match=r"is quantised \(vptq\), which cannot be loaded"):
            open_captioner(folder, device="cpu")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Packages that are there by their names and versions, and hold nothing."""
    asked = [import_utils.is_gptqmodel_available, import_utils.is_optimum_available]

    def put(**versions: str) -> None:
        for name, version in versions.items():
            (tmp_path / "site" / name).mkdir(parents=True)
            (tmp_path / "site" / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
            described = tmp_path / "site" / f"{name}-{version}.dist-info"
            described.mkdir()
            (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for one in asked:
            one.cache_clear()

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gptqmodel", "optimum")]:
        del sys.modules[name]
    for one in asked:
        one.cache_clear()


def quantised(folder: Path, quantization: Mapping[str, Any], sizes: InternVL | None = None) -> Path:
    """A tiny InternVL whose config says that its language model is quantised."""
    write_internvl(folder, sizes or InternVL())
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def test_an_internvl_in_awq_opens_where_its_package_is(packages: Callable[..., None], tmp_path: Path) -> None:
    """The package is a name here: its kernels need another PyTorch, and nothing is loaded by them."""
    packages(gptqmodel="9.0.0")
    captioner = open_captioner(quantised(tmp_path / "vlm", AWQ), device="cpu")
    assert isinstance(captioner, InternVLCaptioner)
    state = {
        "model.language_model.layers.0.self_attn.q_proj.qweight": torch.zeros(2, 2, dtype=torch.int32),
        "model.language_model.layers.0.self_attn.q_proj.scales": torch.zeros(2, 2),
        "model.vision_tower.encoder.layer.0.attention.q_proj.weight": torch.zeros(2, 2),
        "lm_head.weight": torch.zeros(2, 2),
    }
    plain = ["lm_head", "model.vision_tower.encoder.layer.0.attention.q_proj"]
    assert captioner._quantized_as_stored(state) == AWQ | {"modules_to_not_convert": plain}
    state["model.vision_tower.encoder.layer.0.attention.q_proj.qweight"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match="its vision part is quantised too"):
        captioner._quantized_as_stored(state)


def test_an_internvl_in_awq_answers_as_its_weights_unpacked(packages: Callable[..., None], tmp_path: Path) -> None:
    """The layers of the package are ours here; the loading, which decides what they get, is that of transformers."""
    packages(gptqmodel="9.0.0")
    awq.write_package(tmp_path / "site/gptqmodel")
    quick, plain = in_four_bits(tmp_path, AWQ | {"group_size": awq.GROUP}, awq.packed, InternVL())
    torch.testing.assert_close(*logits_of(quick, plain), rtol=1e-5, atol=1e-5)
    assert awq.AwqLinear.begun == 14  # and the rest is as it was
    assert quick.describe(FRAMES, "what?", max_new_tokens=5) == plain.describe(FRAMES, "what?", max_new_tokens=5) != ""


@pytest.mark.parametrize(("kind", "pack"), [("awq", awq.packed), ("gptq", awq.packed_by_rows)])
def test_an_internvl_in_four_bits_answers_by_the_package_itself(
    kind: str, pack: Callable[[torch.Tensor], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel", reason="a package that is no requirement, with others of 300 MB")
    more = {"version": "gemm", "zero_point": True} if kind == "awq" else {"desc_act": False, "sym": False}
    how = {"quant_method": kind, "bits": 4, "group_size": awq.GROUP, **more}
    quick, plain = in_four_bits(tmp_path, how, pack, InternVL(vision_dim=64, dim=128))
    logits, expected = logits_of(quick, plain)
    assert (logits - expected).norm() < 1e-3 * expected.norm()
    assert sum("Linear" in type(one).__name__ and hasattr(one, "qzeros") for one in quick.model.modules()) == 14
    assert quick.describe(FRAMES, "what?", max_new_tokens=5) == plain.describe(FRAMES, "what?", max_new_tokens=5) != ""


def in_four_bits(
    folder: Path, how: Mapping[str, Any], pack: Callable[[torch.Tensor], dict[str, torch.Tensor]], sizes: InternVL
) -> tuple[InternVLCaptioner, InternVLCaptioner]:
    """A captioner whose language model is packed, and one with what the packed weights stand for."""
    folders = quantised(folder / "vlm", how, sizes), folder / "plain"
    write_internvl(folders[1], sizes)
    stored = {key: value for file in weight_files(folders[1]) for key, value in load_file(file).items()}
    layers = [key for key in stored if key.startswith("language_model.model.layers.") and "_proj." in key]
    kept = {key: value for key, value in stored.items() if key not in layers}
    small = {
        key.removesuffix("weight") + end: part.contiguous() for key in layers for end, part in pack(stored[key]).items()
    }
    plain = {key: awq.unpacked(awq.packed(stored[key])) for key in layers}
    for one, more in zip(folders, (small, plain), strict=True):
        for file in one.glob("*.safetensors*"):
            file.unlink()
        save_file(kept | more, one / "model.safetensors")
    opened = [open_captioner(one, device="cpu", dtype=torch.float32) for one in folders]
    assert all(isinstance(one, InternVLCaptioner) for one in opened)
    return opened[0], opened[1]  # type: ignore[return-value]


@torch.inference_mode()
def logits_of(*captioners: InternVLCaptioner) -> list[torch.Tensor]:
    """What each makes of the same question."""
    ids, pixels = captioners[-1].prepare(FRAMES, "what?")
    return [one.model(input_ids=ids, pixel_values=pixels).logits for one in captioners]


def test_what_transformers_asks_of_a_package_is_said_before_loading(
    packages: Callable[..., None], tmp_path: Path
) -> None:
    packages(gptqmodel="0.1.0", optimum="0.1.0")
    folder = quantised(tmp_path / "vlm", {"quant_method": "gptq", "bits": 4})
    message = r"is quantised \(gptq\), which cannot be loaded here \(.*(optimum|version).*\); give weights in bf16"
    with pytest.raises(UserError, match=message) as caught:
        open_captioner(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_an_internvl_in_bitsandbytes_describes(kind: str, tmp_path: Path) -> None:
    """Either layout gives the numbers of a model that was expanded beforehand."""
    bnb = pytest.importorskip("bitsandbytes", reason="a package of 60 MB that is no requirement")
    from transformers import BitsAndBytesConfig, InternVLForConditionalGeneration

    write_internvl(tmp_path / "orig", InternVL(vision_dim=64, dim=64))
    plain = InternVLCaptioner(tmp_path / "orig", "cpu", torch.float32)
    ids, pixels = plain.prepare(FRAMES, "what?")
    plain.model.save_pretrained(tmp_path / "hf")
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    made = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf",
        quantization_config=BitsAndBytesConfig(
            **{kind: True}, llm_int8_skip_modules=whole, bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    made.save_pretrained(tmp_path / "native")
    quantization = json.loads((tmp_path / "native/config.json").read_text())["quantization_config"]
    original = quantised(tmp_path / "chat", quantization)
    shutil.copy(tmp_path / "orig/config.json", original)
    config = json.loads((original / "config.json").read_text())
    config["llm_config"]["quantization_config"] = quantization
    (original / "config.json").write_text(json.dumps(config))
    stored = {key: value for file in weight_files(tmp_path / "native") for key, value in load_file(file).items()}
    renamed = {key.replace("model.language_model.", "language_model.model."): value for key, value in stored.items()}
    renamed = {key.replace("lm_head.", "language_model.lm_head."): value for key, value in renamed.items()}
    for file in weight_files(tmp_path / "orig"):
        renamed |= {key: value for key, value in load_file(file).items() if not key.startswith("language_model.")}
    for file in original.glob("*.safetensors*"):
        file.unlink()
    kept = {key: value for key, value in renamed.items() if not key.startswith("model.")}
    save_file(kept, original / "model.safetensors")
    for file in (tmp_path / "orig").iterdir():
        if file.name in ("vocab.json", "merges.txt") or "token" in file.name:
            shutil.copy(file, tmp_path / "native")

    for name, module in made.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            weight = module.weight
            numbers = (
                bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                if kind == "load_in_4bit"
                else weight.CB.float() * weight.SCB[:, None] / 127
            )
            plain.model.get_submodule(name).weight.data = numbers.float()
    expected = plain.model(input_ids=ids, pixel_values=pixels).logits.detach()
    for folder in (tmp_path / "native", original):
        captioner = open_captioner(folder, device="cpu", dtype=torch.float32)
        assert isinstance(captioner, InternVLCaptioner)
        logits = captioner.model(input_ids=ids, pixel_values=pixels).logits.detach()
        # int8 rounds the inputs too
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=(0.05 if "8" in kind else 1e-4) * float(expected.abs().max())
        )
        assert captioner.describe(FRAMES, "what?", max_new_tokens=5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "give vlm_path or vlm_url"),
        ("/no/such/folder", "there is no VLM folder /no/such/folder"),
        (f"{GOLDEN_VLM.name}/missing", f"there is no VLM folder {GOLDEN_VLM.name}/missing"),
        (GOLDEN_VLM, "has no config.json"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(
    path: Path | str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN_VLM.parent)  # there the third is the path of a missing folder, not a hub id
    with pytest.raises(UserError, match=f"{message}.*or give prompt"):
        open_captioner(path, device="cpu")


def test_a_hub_id_is_fetched_at_the_first_description(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(GOLDEN_VLM / "hf")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    captioner = open_captioner("OpenGVLab/InternVL3_5-8B", device="cpu")
    assert asked == []
    for _ in range(2):
        assert captioner.describe(FRAMES, "What is it?", max_new_tokens=4)
        captioner.close()
    assert [hub_id for hub_id, _ in asked] == ["OpenGVLab/InternVL3_5-8B"]
    assert "*.py" not in asked[0][1]


def test_one_on_the_hub_is_in_memory_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "OpenGVLab/InternVL3_5-8B"
    owner = CaptionerOwner(path, url=None, question="", trust_remote_code=False, main=torch.device("cpu"))

    def unreached(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreached)
    with pytest.raises(UserError, match=r"^cannot download OpenGVLab/InternVL3_5-8B \(no route\).*or give prompt"):
        owner.load(4)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(GOLDEN_VLM / "hf"))
    owner.load(4)
    assert owner.captioner.local.is_loaded  # type: ignore[attr-defined]


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"^cannot download some/model \(no route to host\).*or give prompt") as caught:
        open_captioner("some/model", device="cpu").describe(FRAMES, "What is it?")
    assert "\n" not in str(caught.value)


class Server(HTTPServer):
    """An endpoint that keeps what it was asked and answers what it was told."""

    asked: list[tuple[str, str | None, Any]]
    status = 200
    reply: bytes = json.dumps({"choices": [{"message": {"content": " A cat. "}}]}).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"], None))
        self.say(200, json.dumps({"data": [{"id": "the-model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        self.say(self.server.status, self.server.reply)

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Not in the test output."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_endpoint_is_asked_with_squashed_numbered_frames(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    captioner = open_captioner(None, url=f"{server.url}/chat/completions", device="cpu")
    assert captioner.describe(FRAMES, "What is it?", "Be brief.", max_new_tokens=7) == "A cat."

    (models, *_), (path, key, body) = server.asked
    assert (models, path, key) == ("/v1/models", "/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("the-model", 7, 0)
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part.get("text") for part in user["content"]] == ["Frame1: ", None, "Frame2: ", None, "What is it?"]
    data = user["content"][1]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (448, 448)


def test_endpoint_takes_the_model_that_is_named(server: Server) -> None:
    open_captioner("my/vlm", url=server.url, device="cpu").describe(FRAMES, "What is it?")
    [(_, key, body)] = server.asked
    assert (key, body["model"], len(body["messages"])) == (None, "my/vlm", 1)


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (503, b"loading\nthe model", r"refused with HTTP 503 \(loading the model\)"),
        (200, b"<html>", "did not answer in JSON"),
        (200, b'{"choices": []}', "answered without choices"),
        (200, b'{"error": {"message": "no\\nroom"}}', r"answered with an error \(no room\)"),
        (200, b'{"error": "no"}', r"answered with an error \(no\)"),
        (413, b"", rf"refused with HTTP 413 \({HTTPStatus(413).phrase}\)"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "gave an empty answer"),
    ],
)
def test_endpoint_errors_are_one_line(server: Server, status: int, reply: bytes, message: str) -> None:
    server.status, server.reply = status, reply
    with pytest.raises(UserError, match=f"{message}.*or give prompt") as caught:
        EndpointCaptioner(server.url, "m").describe(FRAMES, "What is it?")
    assert "\n" not in str(caught.value)


def test_a_refusal_in_a_field_of_its_own_is_what_it_says(server: Server) -> None:
    server.reply = json.dumps({"choices": [{"message": {"content": None, "refusal": "I can't help."}}]}).encode()
    assert EndpointCaptioner(server.url, "m").describe(FRAMES, "What is it?") == "I can't help."


def test_an_answer_that_breaks_off_is_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(self: Handler, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 5))
        self.end_headers()
        self.wfile.write(body)

    monkeypatch.setattr(Handler, "say", say)
    with pytest.raises(
        UserError, match=r"captioning with .* failed \(IncompleteRead.* 5 more expected.*or give prompt"
    ):
        EndpointCaptioner(server.url, "m").describe(FRAMES, "What is it?")


def test_an_endpoint_that_is_down_is_one_line(server: Server) -> None:
    url = server.url.replace(str(server.server_port), "1")
    with pytest.raises(UserError, match=f"captioning with {url} failed .*refused.*or give prompt"):
        EndpointCaptioner(url, "m").describe(FRAMES, "What is it?")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://"])
def test_what_is_not_an_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not an address: give one such as"):
        EndpointCaptioner(url)


def test_generic_says_what_transformers_cannot_open(tmp_path: Path) -> None:
    captioner = GenericCaptioner(folder_with(tmp_path, model_type="no_such_type"), "cpu")
    with pytest.raises(UserError, match="transformers cannot open .*vlm_trust_remote_code.*or give prompt"):
        captioner.describe(FRAMES, "What is it?")


def test_generic_never_runs_code_that_was_not_trusted(tmp_path: Path) -> None:
    folder_with(tmp_path, model_type="own", auto_map={"AutoConfig": "trap.C", "AutoModelForImageTextToText": "trap.M"})
    (tmp_path / "trap.py").write_text("raise RuntimeError('ran')", encoding="utf-8")
    with pytest.raises(UserError, match="transformers cannot open .*if you trust the code"):
        open_captioner(tmp_path, device="cpu").describe(FRAMES, "What is it?")


def qwen(folder: Path) -> Path:
    """A folder whose processor can be read, and is damaged by the tests."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((GOLDEN_VLM / "orig" / name).read_bytes())
    return folder_with(folder, model_type="qwen3_vl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", '{"a":' * 5000),
        ("processor_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 5000),
        ("tokenizer.json", '{"model": {}}'),
        ("config.json", '{"model_type": "qwen3_vl", "text_config": 3}'),
    ],
)
def test_a_damaged_folder_of_another_vlm_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    folder = qwen(tmp_path)
    (folder / name).write_text(content, encoding="utf-8")
    captioner = GenericCaptioner(folder, "cpu")
    vars(captioner).update(_model=object())
    with pytest.raises(UserError, match="or give prompt") as caught:
        captioner.describe(FRAMES, "What is it?")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_template_that_fails_is_one_line(tmp_path: Path) -> None:
    class Processor:
        def apply_chat_template(self, *_: Any, **__: Any) -> None:
            raise TypeError("'x' is undefined")

    captioner = GenericCaptioner(qwen(tmp_path), "cpu")
    vars(captioner).update(_model=object(), processor=Processor())
    with pytest.raises(UserError, match="a file in it cannot be read.*'x' is undefined.*or give prompt"):
        captioner.describe(FRAMES, "What is it?")


@pytest.mark.parametrize("config", [{"vision_config": []}, {"force_image_size": "x"}, {"force_image_size": 10**9}])
def test_a_damaged_config_of_trusted_code_is_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(config))} is not as it must be"):
        RemoteCodeCaptioner(folder_with(tmp_path, **config), "cpu")


def test_generic_asks_with_numbered_small_frames() -> None:
    class Inputs(dict[str, torch.Tensor]):
        def to(self, *_: Any) -> Inputs:
            return self

    class Processor:
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Inputs:
            self.messages, self.options = messages, options
            return Inputs(input_ids=torch.tensor([[1, 2, 3]]))

        def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
            return [str(ids.tolist())]

    class Model:
        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options == {"do_sample": False, "max_new_tokens": 512}  # greedy
            return torch.cat([input_ids, torch.tensor([[8, 9]])], 1)

    captioner = GenericCaptioner(GOLDEN_VLM / "hf", "cpu")
    processor = Processor()
    vars(captioner).update(_model=Model(), processor=processor)
    assert captioner.describe(np.zeros((1, 900, 1600, 3), np.uint8), "What is it?", "Be brief.") == "[[8, 9]]"
    # ids and a mask as tensors, up to where the answer begins
    wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert processor.options == wanted
    system, user = processor.messages
    assert system["content"][0]["text"] == "Be brief."
    assert [part.get("text") for part in user["content"]] == ["Frame1: ", None, "What is it?"]
    assert user["content"][1]["image"].size == (448, 252)


REMOTE_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class Config(PreTrainedConfig):
    model_type = "internvl_chat"

class Model(PreTrainedModel):  # as published: no post_init()
    config_class = Config

    def __init__(self, config, use_flash_attn=True):
        super().__init__(config)
        assert use_flash_attn is False
        self.scale = torch.nn.Linear(1, 1)
        self.system_message = "own"

    def chat(self, tokenizer, pixel_values, question, generation_config, num_patches_list=None):
        assert tokenizer("a").input_ids
        asked = (list(pixel_values.shape), question, generation_config, num_patches_list)
        return "|".join(map(str, (self.system_message, *asked)))
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code of its own, in the shape of the published InternVL ones."""
    from safetensors.torch import save_file

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    path = folder_with(tmp_path / "remote", model_type="internvl_chat", force_image_size=56, auto_map=classes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((GOLDEN_VLM / "orig" / name).read_bytes())
    (path / "own.py").write_text(REMOTE_CODE, encoding="utf-8")
    save_file({"scale.weight": torch.ones(1, 1), "scale.bias": torch.ones(1)}, path / "model.safetensors")
    return path


def test_trusted_code_gets_the_official_chat_call(remote: Path) -> None:
    captioner = open_captioner(remote, device="cpu", dtype=torch.float32, trust_remote_code=True)
    asked = (
        "[2, 3, 56, 56]|Frame1: <image>\nFrame2: <image>\nWhat is it?|{'max_new_tokens': 5, 'do_sample': False}|[1, 1]"
    )
    assert captioner.describe(FRAMES, "What is it?", max_new_tokens=5) == f"own|{asked}"
    assert captioner.describe(FRAMES, "What is it?", "mine", max_new_tokens=5) == f"mine|{asked}"
    captioner.close()
    assert captioner.describe(FRAMES, "What is it?", max_new_tokens=5) == f"own|{asked}"


def test_trusted_code_that_needs_a_package_says_which(remote: Path) -> None:
    (remote / "own.py").write_text(f"import no_such_timm\n{REMOTE_CODE}", encoding="utf-8")
    with pytest.raises(UserError, match="needs a package that is not installed .*no_such_timm.*or give prompt"):
        open_captioner(remote, device="cpu", trust_remote_code=True).describe(FRAMES, "What is it?")


def test_code_runs_only_when_trusted() -> None:
    with pytest.raises(UserError, match="TRAP"):  # the trap works, and the golden tests never spring it
        open_captioner(GOLDEN_VLM / "orig", device="cpu", trust_remote_code=True).describe(FRAMES, "What is it?")


def test_a_broken_torchvision_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").touch()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "from torchvision import part\nraise RuntimeError('operator torchvision::nms does not exist')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        for _ in range(2):
            hide_broken_torchvision()
        assert sys.modules["torchvision"] is None
        assert "torchvision.part" not in sys.modules
        assert caplog.text.count("nms does not exist") == 1
    finally:
        sys.modules.pop("torchvision", None)


def test_a_folder_without_a_config_is_refused_before_its_model_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a VLM folder, it has no config.json"):
        GenericCaptioner(tmp_path, "cpu")


def test_an_error_of_bearable_length_is_told_whole() -> None:
    assert one_line(ValueError("x" * 200)) == "x" * 200
    assert one_line(ValueError("x" * 201)) == "x" * 197 + "..."
    assert one_line(ValueError("two\n  lines")) == "two lines" and one_line(KeyError()) == "KeyError"


def test_the_size_of_a_vlm_is_asked_of_the_hub_only_by_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def model_info(_: object, name: str, **more: Any) -> Any:
        asked.append(name)
        sizes = {"a.safetensors": 20, "b.safetensors": 10, "c.bin": 5}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("wan.captioner.factory.local_folder", lambda path: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    assert weight_bytes("some/folder") is None and weight_bytes("/no/such/folder") is None and not asked
    assert weight_bytes("Some/Model") == 30 and asked == ["Some/Model"]


@pytest.mark.parametrize(("count", "numbers"), [(3, [1, 5, 8]), (1, [5]), (0, [9])])
def test_decord_is_asked_for_the_middles_of_equal_parts_or_the_last_frame(
    count: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    class Reader:
        def __init__(self, path: str, num_threads: int) -> None:
            assert (path, num_threads) == ("a.mp4", 1)

        def __len__(self) -> int:
            return 10

        def get_batch(self, wanted: list[int]) -> Any:
            frames = np.array(wanted, np.uint8)[:, None, None, None].repeat(3, 3)
            return SimpleNamespace(asnumpy=lambda: frames)

    monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=Reader))
    monkeypatch.setattr(sys, "argv", ["decord_worker.py", "a.mp4", str(count)])
    decord_worker.main()
    sys.stdout.flush()
    expected = f"{len(numbers)} 1 1\n".encode() + bytes(number for number in numbers for _ in range(3))
    assert capfdbinary.readouterr().out == expected


class Answering(BackEnd):
    source = "a VLM"

    def __init__(self, answer: str) -> None:
        self.words = answer

    def answer(self, frames: Any, question: str, system: str | None, max_new_tokens: int) -> str:
        return self.words

    def close(self) -> None: ...


def test_an_answer_is_of_bearable_length_and_says_something() -> None:
    assert Answering(" A cat. ").describe(FRAMES, "?") == "A cat."
    assert Answering("x" * 8001).describe(FRAMES, "?") == "x" * 8000
    assert Answering("A \ud83c cat").describe(FRAMES, "?", max_new_tokens=1) == "A ? cat"
    with pytest.raises(UserError, match="gave an empty answer: ask with another vlm_question"):
        Answering(" \n").describe(FRAMES, "?")
    with pytest.raises(UserError, match="max_new_tokens is 0: give at least 1"):
        Answering("A cat.").describe(FRAMES, "?", max_new_tokens=0)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused_with_its_shape(frame: npt.NDArray[Any]) -> None:
    shape = re.escape(f"a frame is {frame.dtype} {list(frame.shape)}")
    with pytest.raises(UserError, match=shape):
        to_images([frame])
    with pytest.raises(UserError, match="there are no frames"):
        to_images([])
    assert [image.size for image in to_images([np.zeros((2, 3, 3), np.uint8), Image.new("L", (5, 4))])] == [
        (3, 2),
        (5, 4),
    ]


class Local(LocalModel):
    loads = 0

    def load(self) -> Any:
        self.loads += 1
        return object()

    def answer(self, frames: Any, question: str, system: str | None, max_new_tokens: int) -> str:
        return str(self.model)


def test_a_model_loads_at_its_first_use_and_goes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr("wan.captioner.base.release_memory", released.append)
    hidden: list[int] = []
    monkeypatch.setattr("wan.captioner.base.hide_broken_torchvision", lambda: hidden.append(1))
    local = Local("vlm", "cpu")
    assert (local.is_loaded, local.waits_in_host_memory, local.dtype) == (False, False, torch.bfloat16)
    local.close()
    assert not released and local.model is local.model and local.loads == 1
    assert local.is_loaded and local.waits_in_host_memory
    local.close()
    assert released == [torch.device("cpu")] and not local.is_loaded and hidden == [1]
    _ = local.model
    assert local.loads == 2
    elsewhere = Local("vlm", "meta")
    _ = elsewhere.model
    assert elsewhere.is_loaded and not elsewhere.waits_in_host_memory


@pytest.mark.parametrize(
    ("what", "keys", "message"),
    [
        ("missing", ["b", "a"], r"has 2 missing weights \(a, b\): download it again"),
        ("mismatched", ["d", "c", "b", "a"], r"has 4 mismatched weights \(a, b, c, ...\)"),
        ("unexpected", ["c", "b", "a"], r"has 3 unexpected weights \(a, b, c\)"),
        ("missing", [], ""),
    ],
)
def test_weights_that_do_not_fit_are_named(what: str, keys: list[str], message: str) -> None:
    asked: dict[str, Any] = {}

    class Model:
        @staticmethod
        def from_pretrained(source: Any, **options: Any) -> Any:
            asked.update(options, source=source)
            report: dict[str, list[str]] = {f"{name}_keys": [] for name in ("missing", "unexpected", "mismatched")}
            return "model", report | {f"{what}_keys": keys}

    local = Local("vlm", "meta", torch.float16)
    if message:
        with pytest.raises(UserError, match=message):
            local.from_pretrained(Model, Path("vlm"))
    else:
        assert local.from_pretrained(Model, Path("vlm"), more=1) == "model"
        assert asked == {
            "source": Path("vlm"),
            "dtype": torch.float16,
            "device_map": {"": "meta"},
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            "more": 1,
        }
        local.from_pretrained(Model, None, home=torch.device("cpu"))
        assert asked["device_map"] == {"": "cpu"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "captioning with a VLM ran out of memory: use vlm_device cpu, a smaller model, or give prompt"),
        (OSError("no\nroom"), r"captioning with a VLM failed \(no room\): put that right, or give prompt"),
        (UserError("it is gone"), "it is gone, or give prompt to go on without captioning"),
    ],
)
def test_what_can_go_wrong_outside_offers_a_prompt(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), foreseen_failures("a VLM"):
        raise error


def test_what_the_library_raises_over_a_folder_is_one_line_but_for_what_others_tell() -> None:
    with pytest.raises(UserError, match="vlm or a file in it cannot be read"), reading(Path("vlm")):
        raise KeyError("a")
    for told in (OSError("a"), MemoryError(), UserError("a"), ImportError("a")):
        with pytest.raises(type(told)), reading(Path("vlm"), ImportError):
            raise told
    with pytest.raises(UserError, match="cannot be read"), reading(Path("vlm")):
        raise ImportError("a")


def endpoint_of(url: str = "http://h/v1", model: str | None = "m") -> EndpointCaptioner:
    return EndpointCaptioner(url, model)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"choices": [{"message": {"content": "A cat."}}]}, "A cat."),
        ({"choices": [{"message": {"content": [{"text": "A"}, "x", {"text": "cat."}, {}]}}]}, "A cat. "),
        ({"choices": [{"message": {"content": "", "refusal": "No."}}]}, "No."),
        ({"choices": [{"message": "A cat."}]}, ""),
        ({"choices": [{"message": {"content": 3}}]}, ""),
        ({"error": None, "choices": [{"message": {"content": "A cat."}}]}, "A cat."),
    ],
)
def test_an_endpoint_s_answer_is_its_first_choice(reply: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    one = endpoint_of()

    def call(path: str, body: Any = None) -> Any:
        asked.append((path, body))
        return reply

    monkeypatch.setattr(one, "call", call)
    assert one.answer(FRAMES, "What?", "", 9) == text
    [(path, body)] = asked
    assert path == "/chat/completions" and (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0)
    assert [message["role"] for message in body["messages"]] == ["user"]
    asked.clear()
    one.answer(FRAMES, "What?", "Be brief.", 9)
    assert [message["role"] for message in asked[0][1]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"error": {"message": "no room"}}, r"answered with an error \(no room\)"),
        ({"error": {"code": 5}}, r"answered with an error \(\{'code': 5\}\)"),
        ({"error": "long " * 99}, r"answered with an error \((long )+l?o?\w*\.\.\.\)"),
        ({"data": []}, "answered without data: give an OpenAI-compatible vlm_url"),
        ([], "answered without data"),
        ({"data": [{}]}, "answered without data"),
        (None, "answered without data"),
    ],
)
def test_an_endpoint_that_answers_otherwise_is_told_so(reply: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        endpoint_of().first(reply, "data", "id")


@pytest.mark.parametrize(("size", "too_much"), [(4 << 20, False), ((4 << 20) + 1, True)])
def test_an_endpoint_s_answer_has_four_mebibytes_at_most(
    size: int, too_much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(request: Any, timeout: float) -> bytes:
        asked.append((request.full_url, dict(request.header_items()), request.data, timeout))
        return b'"' + b"a" * (size - 2) + b'"'

    monkeypatch.setattr(endpoint, "_ask", ask)
    monkeypatch.setenv("OPENAI_API_KEY", " key ")
    if too_much:
        with pytest.raises(UserError, match="answered with more than 4 MiB"):
            endpoint_of().call("/models")
    else:
        assert len(endpoint_of().call("/models")) == size - 2
        assert asked == [
            ("http://h/v1/models", {"Content-type": "application/json", "Authorization": "Bearer key"}, None, 300.0)
        ]
        endpoint_of("http://h/v1/?a=b").call("/chat", {"a": 1})
        assert asked[1][0] == "http://h/v1/chat?a=b" and asked[1][2] == b'{"a": 1}'
        monkeypatch.delenv("OPENAI_API_KEY")
        endpoint_of().call("/models")
        assert "Authorization" not in asked[2][1]


class Response:
    def __init__(self, blocks: list[bytes], length: int = 0) -> None:
        self.blocks, self.length, self.asked = blocks, length, list[int]()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def read1(self, count: int) -> bytes:
        self.asked.append(count)
        return self.blocks.pop(0) if self.blocks else b""


def test_an_answer_is_read_to_a_byte_more_than_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 10)
    for blocks, length, content, asked in (
        ([b"abc", b"def"], 0, b"abcdef", [11, 8, 5]),
        ([b"abcdefghij"], 0, b"abcdefghij", [11, 1]),
        ([b"abcdefghijk"], 5, b"abcdefghijk", [11]),
    ):
        response = Response(blocks, length)
        opener = SimpleNamespace(open=lambda request, timeout, response=response: response)
        monkeypatch.setattr(endpoint, "build_opener", lambda handler, opener=opener: opener)
        request: Any = None
        assert endpoint._ask(request, 9.0) == content and response.asked == asked
    response = Response([b"abc"], 5)
    opener = SimpleNamespace(open=lambda request, timeout: response)
    monkeypatch.setattr(endpoint, "build_opener", lambda handler: opener)
    with pytest.raises(IncompleteRead, match="3 bytes read, 5 more expected"):
        endpoint._ask(request, 9.0)
    assert endpoint._ask(request, -1.0) == b""  # no time is left


@pytest.mark.parametrize(
    ("code", "body", "reason"),
    [(500, b" it burns\n", "it burns"), (500, b"", "Failed"), (404, b"x" * 3000, "x" * 2000), (302, b"away", "Failed")],
)
def test_an_error_of_an_endpoint_has_what_it_says(
    code: int, body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Any, timeout: float) -> Any:
        raise HTTPError("http://h", code, "Failed", Message(), io.BytesIO(body))

    monkeypatch.setattr(endpoint, "build_opener", lambda handler: SimpleNamespace(open=fail))
    request: Any = None
    with pytest.raises(HTTPError) as caught:
        endpoint._ask(request, 9.0)
    assert caught.value.msg == reason


def test_what_was_sent_secretly_is_blotted_out_from_four_letters_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abcd")
    one = endpoint_of("http://me:wxyz@h/v1?key=hidden&n=123")
    assert one._without_secrets("abcd wxyz hidden 123 me") == "*** *** *** 123 me"
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    assert endpoint_of()._without_secrets("abc") == "abc"
    for key in ("schlüssel", "a\tb", "a\nb"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that no key has"):
            endpoint_of().call("/models")


def test_the_models_of_a_server_that_refuses_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(request: Any, timeout: float) -> bytes:
        raise HTTPError("http://h", 404, "Not Found", Message(), None)

    monkeypatch.setattr(endpoint, "_ask", ask)
    with pytest.raises(UserError, match=r"HTTP 404 \(Not Found\): name its model with vlm_path, or check vlm_url"):
        endpoint_of().call("/models")
    with pytest.raises(UserError, match=r"HTTP 404 \(Not Found\): check vlm_url"):
        endpoint_of().call("/chat/completions")


def test_work_that_hangs_is_left_behind() -> None:
    stop = threading.Event()
    assert endpoint._within(5.0, lambda: b"done") == b"done"
    with pytest.raises(KeyError):
        endpoint._within(5.0, lambda: dict[str, bytes]()["a"])
    with pytest.raises(TimeoutError, match=r"timed out: no whole answer in 0.05 s"):
        endpoint._within(0.05, lambda: b"" if stop.wait(9) else b"")
    stop.set()


def test_a_frame_is_sent_as_a_square_of_448_pixels() -> None:
    level = Image.new("RGB", (30, 50), (200, 40, 90))
    with Image.open(io.BytesIO(base64.b64decode(endpoint.jpeg_url(level).partition(",")[2]))) as sent:
        assert (sent.format, sent.size) == ("JPEG", (448, 448))
        assert np.abs(np.asarray(sent).astype(int) - (200, 40, 90)).max() <= 2


@pytest.mark.parametrize(
    ("width", "height", "grids", "grid"),
    [
        (200, 100, [(1, 1), (2, 1), (4, 2)], (2, 1)),
        (100, 100, [(1, 1), (2, 2)], (1, 1)),
        (200, 100, [(1, 1), (2, 2)], (1, 1)),  # exactly half of it
        (201, 201, [(1, 1), (2, 2)], (2, 2)),  # more than half
        (142, 142, [(1, 1), (2, 2)], (2, 2)),
        (141, 141, [(1, 1), (2, 2)], (1, 1)),
        (100, 200, [(1, 1), (2, 1), (1, 2)], (1, 2)),
        (300, 200, [(1, 1), (2, 1)], (2, 1)),
        (90, 60, [(1, 1), (2, 1)], (1, 1)),  # as near to both, and too small for the larger
        (300, 201, [(2, 1), (1, 1)], (1, 1)),
    ],
)
def test_the_grid_of_tiles_is_the_nearest_in_shape(
    width: int, height: int, grids: list[tuple[int, int]], grid: tuple[int, int]
) -> None:
    assert closest_grid(width, height, grids, 100) == grid


def test_tiles_are_counted_from_one_to_twelve() -> None:
    for least, most in ((0, 1), (3, 2)):
        with pytest.raises(UserError, match=f"min_num {least} and max_num {most} must be at least 1 and in order"):
            dynamic_preprocess(Image.new("RGB", (8, 8)), min_num=least, max_num=most, image_size=8)
    assert len(dynamic_preprocess(Image.new("RGB", (120, 90)), image_size=8)) == 12  # 4 x 3
    assert len(dynamic_preprocess(Image.new("RGB", (120, 90)), image_size=8, use_thumbnail=True)) == 13
    assert [tile.size for tile in dynamic_preprocess(Image.new("RGB", (448, 448)))] == [(448, 448)]
    assert len(dynamic_preprocess(Image.new("RGB", (80, 80)), min_num=2, max_num=3, image_size=8)) == 2


@pytest.mark.parametrize(
    ("model_type", "auto_map", "trusted", "kind"),
    [
        ("internvl_chat", True, True, RemoteCodeCaptioner),
        ("internvl_chat", True, False, InternVLCaptioner),
        ("internvl_chat", False, True, InternVLCaptioner),
        ("internvl", True, True, InternVLCaptioner),
        ("qwen3_vl", True, True, GenericCaptioner),
    ],
)
def test_the_code_of_a_folder_runs_where_it_brings_some_and_is_trusted(
    model_type: str, auto_map: bool, trusted: bool, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def stub(name: type) -> Any:
        def make(*given: Any, **options: Any) -> Any:
            made.append((name, given, options))
            return name

        return make

    for one in (RemoteCodeCaptioner, InternVLCaptioner, GenericCaptioner):
        monkeypatch.setattr(f"wan.captioner.factory.{one.__name__}", stub(one))
    room: Any = object()
    folder = folder_with(tmp_path, model_type=model_type, **({"auto_map": {}} if auto_map else {}))
    opened: Any = open_captioner(folder, device="meta", dtype=torch.float16, trust_remote_code=trusted, room=room)
    assert opened is kind
    [(_, given, options)] = made
    assert given == (folder, "meta", torch.float16, *([room] if kind is InternVLCaptioner else []))
    assert options == ({"trust_remote_code": trusted and auto_map} if kind is GenericCaptioner else {})
    for code in (True, False):
        GenericCaptioner(folder, "cpu", trust_remote_code=code)


def test_trusted_code_of_the_hub_is_fetched_with_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for code in (True, False):
        opened: Any = open_captioner(f"some/model@{commit}", device="cpu", trust_remote_code=code)
        assert opened.patterns == ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors", *["*.py"] * code]
    opened.close()
    closed: list[int] = []
    asked: list[Any] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return "/cache/model"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    local = SimpleNamespace(close=lambda: closed.append(1), answer=lambda *given: given)
    opened.open_folder = lambda folder: local
    for _ in range(2):
        assert opened.answer(FRAMES, "?", None, 5) == (FRAMES, "?", None, 5)
    assert asked == [("some/model", {"allow_patterns": opened.patterns, "revision": commit})]
    opened.close()
    assert closed == [1]


def test_the_size_of_a_vlm_is_that_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "wan")
    for name, size in (("a.safetensors", 20), ("b.safetensors", 10), ("c.bin", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 30 and local_folder(tmp_path) == tmp_path
    (tmp_path / "none").mkdir()
    assert weight_bytes(tmp_path / "none") is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[Any] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert weight_bytes(f"some/model@{commit}") == 30 and local_folder("some/model") == tmp_path
    assert asked == [
        ("some/model", {"local_files_only": True, "revision": commit}),
        ("some/model", {"local_files_only": True}),
    ]
    assert local_folder("/no/such/folder") is None
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug
        local_folder("some/model")

    def info(_: object, name: str, **options: Any) -> Any:
        if name == "no/where":
            raise ConnectionError("no route")
        assert options == {"files_metadata": True, "timeout": 10}
        listed = [SimpleNamespace(rfilename="a.safetensors", size=None)]
        return SimpleNamespace(siblings=listed if name == "no/sizes" else None)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("wan.captioner.factory.local_folder", lambda path: None)
    assert [weight_bytes(name) for name in ("no/where", "no/sizes", "no/files")] == [None] * 3
    assert "cannot tell how large no/where is: no route" in caplog.text


@pytest.mark.parametrize(
    ("config", "image_size", "tokens"),
    [
        ({}, 448, 256),
        ({"force_image_size": 224}, 224, None),
        ({"vision_config": {"image_size": 336}}, 336, None),
        ({"force_image_size": None, "vision_config": {"image_size": 56}}, 56, None),
    ],
)
def test_trusted_code_sees_pictures_of_its_size(
    config: dict[str, Any], image_size: int, tokens: int | None, tmp_path: Path
) -> None:
    assert RemoteCodeCaptioner(folder_with(tmp_path, **config), "cpu").image_size == image_size


def test_generic_asks_without_a_system_message_and_reads_what_is_new() -> None:
    class Inputs(dict[str, torch.Tensor]):
        def to(self, *where: Any) -> Inputs:
            moved.append(where)
            return self

    class Processor:
        def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Inputs:
            self.messages = messages
            return Inputs(input_ids=torch.tensor([[1, 2]]))

        def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
            assert options == {"skip_special_tokens": True}
            return [str(ids.tolist()), "another"]

    class Model:
        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return torch.cat([input_ids, torch.tensor([[8]])], 1)

    moved: list[Any] = []
    captioner, processor = GenericCaptioner(GOLDEN_VLM / "hf", "cpu", torch.float16), Processor()
    assert captioner.trust_remote_code is False and captioner.faults == ("missing", "mismatched")
    vars(captioner).update(_model=Model(), processor=processor)
    assert captioner.answer(np.zeros((2, 30, 50, 3), np.uint8), "What?", "", 9) == "[[8]]"
    assert moved == [(torch.device("cpu"), torch.float16)]
    (user,) = processor.messages
    assert [part.get("text") for part in user["content"]] == ["Frame1: ", None, "Frame2: ", None, "What?"]
    assert user["content"][1]["image"].size == (50, 30)  # a small one stays


def test_an_endpoint_that_hangs_does_not_keep_the_program() -> None:
    assert endpoint._within(5.0, lambda: str(threading.current_thread().daemon).encode()) == b"True"


def test_transformers_is_asked_whether_weights_can_be_loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Quantizer:
        @staticmethod
        def from_config(config: Any, **options: Any) -> Any:
            asked.append((config, options))
            return Quantizer()

        def validate_environment(self, **options: Any) -> None:
            asked.append(options)
            if options["device_map"][""].type == "cpu":
                raise ValueError("needs a GPU")

    monkeypatch.setattr("transformers.quantizers.AutoHfQuantizer", Quantizer)
    factory._check_environment(Path("vlm"), "awq", {"bits": 4}, torch.device("meta"))
    config = {"quant_method": "awq", "bits": 4}
    assert asked == [(config, {"pre_quantized": True}), {"device_map": {"": torch.device("meta")}}]
    with pytest.raises(UserError, match=r"quantised \(awq\), which cannot be loaded here \(needs a GPU\)"):
        factory._check_environment(Path("vlm"), "awq", {"bits": 4}, torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_trusted_code_is_loaded_as_such(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(self: Any, kind: Any, source: Path, **options: Any) -> str:
        asked.append((kind.__name__, source, options))
        return "model"

    monkeypatch.setattr(LocalModel, "from_pretrained", from_pretrained)
    for name in ("AutoTokenizer", "AutoProcessor"):
        monkeypatch.setattr(
            f"transformers.{name}.from_pretrained",
            lambda folder, name=name, **options: asked.append((name, folder, options)),
        )
    folder = folder_with(tmp_path, model_type="internvl_chat")
    remote = RemoteCodeCaptioner(folder, device)
    assert remote.load() == "model" and remote.tokenizer is None
    assert asked == [
        ("AutoModel", folder, {"trust_remote_code": True, "use_flash_attn": device == "cuda"}),
        ("AutoTokenizer", folder, {"trust_remote_code": True}),
    ]
    for trusted in (True, False):
        asked.clear()
        generic = GenericCaptioner(folder, device, trust_remote_code=trusted)
        assert generic.load() == "model" and generic.processor is None
        assert asked == [
            ("AutoModelForImageTextToText", folder, {"trust_remote_code": trusted}),
            ("AutoProcessor", folder, {"trust_remote_code": trusted}),
        ]
