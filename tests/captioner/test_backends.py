"""Which back end a path gets, and the ones beside native InternVL: endpoint, hub, generic, remote code."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
    hide_broken_torchvision,
    open_captioner,
)
from wan.captioner.base import one_line
from wan.captioner.factory import weight_bytes
from wan.captioner.internvl import weight_files
from wan.errors import UserError
from wan.media import decord_worker

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
        (413, b"", r"refused with HTTP 413 \(Request Entity Too Large\)"),
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
