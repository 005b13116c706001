"""The training stages start, save themselves and go on; what they learn is measured on a GPU (training/LOG.md)."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from tests.support.golden import ROOT
from tests.support.tiny_checkpoint import write_prompt_tokenizer
from training import scenes
from training.__main__ import main
from training.captioner import (
    IGNORED,
    WAYS,
    Conversations,
    answer_logits,
    identity_answer,
    misread,
    next_answer,
    told_of,
)
from training.chains import follows, make_chains
from training.denoiser import TEXT_ROWS, InChannels, forward, new_denoiser, train_denoiser
from training.distillation import SIGMAS, TURBOS, Teacher, attach, opened, train_turbo
from training.encoding import encode_clips
from training.export import export, import_models
from training.family import (
    CAPTIONER,
    DENOISERS,
    PROMPT_WORDS,
    TEXT,
    VAES,
    build_captioner,
    build_denoiser,
    build_text_encoder,
    build_vae,
    caption_tokenizer,
    in_fp8,
)
from training.loop import Progress, Settings, load, save
from training.loop import train as run
from training.reading import read_many, shapes_in
from training.text import Prompts, add_word
from training.vae import clips, train_vae
from wan import WanV2V5B
from wan.captioner.next_prompt import KEEP, Memory, read_identity, read_next_prompt
from wan.configs import config_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of `models/`."""
    folder = tmp_path_factory.mktemp("trained")
    assert len(import_models(ROOT / "models", folder)) == 10
    return folder


@pytest.fixture
def imported(trained: Path, tmp_path: Path) -> Path:
    """A folder of them that a stage may write to."""

    def copied(source: str, target: str) -> None:  # a checkpoint is replaced, never changed
        (os.link if source.endswith(".pt") else shutil.copy)(source, target)

    return Path(shutil.copytree(trained, tmp_path / "imported", copy_function=copied))


@pytest.mark.parametrize("stage", ["text", "vae22"])
def test_a_stage_goes_on_from_its_own_checkpoint(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = ["--frames", "5"] if stage in VAES else []
    command = [stage, "--folder", str(tmp_path), "--steps", "1", "--batch", "1", "--device", "cpu", *frames]
    steps = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["training", *command])
        main()
        saved = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        steps.append(saved["steps"])
        assert all(torch.isfinite(value).all() for value in saved["weights"].values())
    assert steps == [1, 2]


@pytest.mark.parametrize(("stage", "clips", "rounds"), [("dit5b", "clips22", 1), ("dit14b_low", "clips21", 2)])
def test_a_denoiser_goes_on_from_the_exported_one_with_its_own_errors(
    stage: str, clips: str, rounds: int, imported: Path
) -> None:
    before = load(imported / f"{stage}.pt")["weights"]
    settings = Settings(imported, torch.device("cpu"), 5, batch=1, rate=1e-5, seed=6, steps=1, compiler="eager")
    for steps in range(1, rounds + 1):
        encode_clips(clips, settings)
        chunk = load(imported / clips / f"{steps - 1:08d}.pt")
        assert all(torch.isfinite(value).all() for value in chunk.values())
        train_denoiser(stage, settings)
        assert load(imported / f"{stage}.pt")["steps"] == steps
    weights = load(imported / f"{stage}.pt")["weights"]
    for name, value in weights.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-3)
    assert any(not torch.equal(value, before[name]) for name, value in weights.items())
    made = load(next((imported / "seen" / clips).glob("*.pt")))  # by the denoiser, for the captioner
    assert len(made["told"]) == len(made["levels"]) <= 1  # none if the clip is not what the scene shows


def test_a_matrix_that_is_stored_in_fp8_is_rounded_while_the_model_learns_and_itself_is_kept(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "head": torch.nn.Linear(2, 2)})
    block = model["blocks"][0]  # type: ignore[index]
    used: list[torch.Tensor] = []

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        used.append(block.weight.detach().clone())
        out: torch.Tensor = model["head"](block(batch["x"]))
        return out.square().sum()

    settings = Settings(tmp_path, torch.device("cpu"), 5, batch=1, rate=1e-3, steps=3, warm_up=1)
    batches = itertools.repeat({"x": torch.ones(1, 2)})
    run(
        name="any", model=model, loss_of=loss_of, batches=batches, settings=settings, progress=Progress(), in_fp8=in_fp8
    )
    for weight in used:
        assert torch.equal(weight, weight.to(torch.float8_e4m3fn).float())
    kept = load(tmp_path / "any.pt")["weights"]["blocks.0.weight"]  # what a resumed training goes on with
    assert not torch.equal(kept, kept.to(torch.float8_e4m3fn).float())


def test_the_a14b_is_taught_to_keep_the_frames_that_it_is_given() -> None:
    batch = {"latents": torch.zeros(2, 16, 5, 4, 4), "known": torch.ones(2, 16, 5, 4, 4), "count": torch.tensor([1, 3])}
    made = InChannels().target(batch).mean((1, 3, 4))
    assert made.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_what_was_imported_is_exported_as_it_was(trained: Path, tmp_path: Path) -> None:
    assert import_models(ROOT / "models", trained) == []  # what is there stays
    export(trained, tmp_path / "models")
    for file in sorted((ROOT / "models").glob("*/**/*.safetensors")):
        again = load_file(tmp_path / "models" / file.relative_to(ROOT / "models"))
        for name, value in load_file(file).items():
            assert again[name].dtype == value.dtype and torch.equal(again[name].float(), value.float()), name
    for file in sorted((ROOT / "models").glob("*/*.pth")):
        again = torch.load(tmp_path / "models" / file.relative_to(ROOT / "models"), weights_only=True)
        for name, value in torch.load(file, weights_only=True).items():
            assert torch.equal(again[name], value), name


def test_a_decoder_trains_without_its_encoder(imported: Path) -> None:
    before = load(imported / "vae21.pt")["weights"]
    cpu = torch.device("cpu")
    train_vae("vae21", Settings(imported, cpu, 5, batch=1, rate=1e-4, steps=1, frames=5, decoder_only=True))
    after = load(imported / "vae21.pt")["weights"]
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_trained_parts_become_a_folder_that_the_pipelines_load(tmp_path: Path) -> None:
    sizes, shapes = TEXT, VAES["vae22"].shapes()
    runs, models = tmp_path / "runs", tmp_path / "models"
    dit, vae, text = build_denoiser(DENOISERS["dit5b"]), build_vae(VAES["vae22"]), build_text_encoder(sizes)
    save(runs / "dit5b.pt", {"weights": dit.state_dict()})
    save(runs / "vae22.pt", {"weights": vae.state_dict(), "mean": [0.5] * 48, "std": [2.0] * 48})
    save(runs / "text.pt", {"weights": text.state_dict()})
    write_prompt_tokenizer(runs / "prompt_tokenizer", sizes.vocab_size, PROMPT_WORDS)
    [folder] = export(runs, models)
    assert folder == models / "tiny-Wan2.2-TI2V-5B"
    config = config_for("v2v-5B", folder)
    assert (config.vae_mean, config.vae_std, config.frame_num) == ((0.5,) * 48, (2.0,) * 48, 17)
    model = WanV2V5B(config, str(folder))
    loaded = model.model.state_dict()
    for name, value in dit.state_dict().items():
        # matrices of blocks are in fp8, which has three bits after the first
        rtol, atol = (2**-4, 2**-10) if loaded[name].dtype == torch.float8_e4m3fn else (1e-2, 1e-3)
        torch.testing.assert_close(loaded[name].float(), value, rtol=rtol, atol=atol)
    written = torch.load(folder / "Wan2.2_VAE.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in written.items()} == shapes


def test_few_rows_of_zeros_train_the_model_that_sees_all_of_them(tmp_path: Path) -> None:
    settings = Settings(tmp_path, torch.device("cpu"), minutes=1, batch=2, rate=0.0)
    model = new_denoiser("dit5b", settings)
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    plain = build_denoiser(DENOISERS["dit5b"])
    plain.load_state_dict(model.state_dict())
    text = torch.randn(2, 64, TEXT.dim)
    text[0, 20:] = 0
    latents, steps = torch.randn(2, 48, 2, 6, 10), torch.tensor([[0.0, 700.0], [300.0, 300.0]])
    with torch.no_grad():
        trained = forward(model, latents, steps, text)
        used = plain(latents, steps, pad(text, (0, 0, 0, TEXT_ROWS - 64)), return_dict=False)[0]
    torch.testing.assert_close(trained, used, rtol=1e-4, atol=1e-4)


def test_an_answer_does_not_depend_on_the_padding_of_its_row(tmp_path: Path) -> None:
    settings = Settings(tmp_path, torch.device("cpu"), minutes=1, batch=3, rate=0.0)
    tokenizer, ids = caption_tokenizer(tmp_path / "caption_tokenizer")
    torch.manual_seed(0)
    model = build_captioner(CAPTIONER, ids).eval()
    asked, world = Conversations(tokenizer, ids, settings), scenes.sample(3, settings.generator(0))
    batch = asked.rows(asked.pictures(world, 9), told_of(world, 0), asked.describe)
    together = answer_logits(model, batch, ids["<IMG_CONTEXT>"])
    for row in range(3):
        told = int((batch["labels"][row] != IGNORED).sum())
        end = int(batch["where"][row, told - 1]) + 2  # the last answer token stands after the one it is told from
        answer = batch["ids"][row, end - told : end]
        assert torch.equal(answer, batch["labels"][row, :told])
        alone = {
            "pictures": batch["pictures"][row : row + 1],
            "ids": batch["ids"][row : row + 1, :end],
            "where": batch["where"][row : row + 1, :told],
        }
        logits = answer_logits(model, alone, ids["<IMG_CONTEXT>"])
        torch.testing.assert_close(together[row, :told], logits[0], rtol=1e-4, atol=1e-4)


def test_many_pictures_are_read_as_one_is() -> None:
    pictures = scenes.sample(12, torch.Generator().manual_seed(5)).draw(torch.tensor([0]))[:, :, 0]
    read = read_many(pictures)
    for row, picture in enumerate(pictures):
        colours = [list(scenes.COLOURS)[index] for index in read.present[row].nonzero()[:, 0]]
        wanted = shapes_in(picture)
        assert colours == [shape.colour for shape in wanted]
        for shape in wanted:
            place = row, list(scenes.COLOURS).index(shape.colour)
            assert scenes.SHAPES[int(read.kind[place])] == shape.shape
            assert read.place[place].tolist() == pytest.approx([shape.x, shape.y], abs=0.5)


def test_a_clip_follows_its_scene_only_with_its_kinds_and_ways() -> None:
    world = scenes.sample(15, torch.Generator().manual_seed(5))
    clip = world.draw(torch.arange(-16, 1))
    right = follows(clip, world, 0)
    assert right.float().mean() >= 0.8  # all but those that have just turned back
    for wrong in (
        replace(world, shape=(world.shape + 1) % 3),
        replace(world, velocity=-world.velocity, start=world.start),
        replace(world, colour=(world.colour + 1) % 6),
    ):
        moves = (world.velocity.abs().sum(2) * world.present).sum(1) > 0
        assert not (follows(clip, wrong, 0) & moves).any()


def test_the_answers_that_the_captioner_learns_are_accepted() -> None:
    world = scenes.sample(20, torch.Generator().manual_seed(6))
    for told in told_of(world, 0):
        identity, subject = read_identity(identity_answer(told["names"]))
        prompt, memory = read_next_prompt(next_answer(told["now"][0]), Memory(identity, subject), "")
        assert prompt == f"{told['now'][0]} {KEEP}" and memory.camera


def test_pictures_that_show_other_kinds_are_told_as_what_is_known(tmp_path: Path) -> None:
    world = scenes.sample(200, torch.Generator().manual_seed(6))
    shown = misread(world, torch.Generator().manual_seed(7))
    other = shown.shape != world.shape
    assert 0.02 < 1 - shown.present[world.present].float().mean() < 0.15 and not shown.present[~world.present].any()
    assert 0.4 < other[world.spin == 0].float().mean() < 0.6 and not other[world.spin != 0].any()
    settings = Settings(tmp_path, torch.device("cpu"), minutes=1, batch=1, rate=0.0)
    asked = Conversations(*caption_tokenizer(tmp_path / "caption_tokenizer"), settings)
    for told in told_of(world, 0)[:20]:
        question, answer = asked.remembering(told)
        assert all(name in question and name in answer for name in told["names"])

    # what was said before may be wrong on where a shape goes, and on nothing else
    caption, ways = told_of(world, 0)[0]["now"][0], set[str]()
    for _ in range(50):
        astray = asked._perhaps_astray()(caption)
        assert WAYS.sub("", astray) == WAYS.sub("", caption)
        ways.add(astray)
    assert caption in ways and len(ways) > 5


def test_a_prompt_without_the_ending_is_encoded_as_before_it_was_a_word(imported: Path) -> None:
    settings = Settings(imported, torch.device("cpu"), minutes=1, batch=1, rate=0.0)
    prompts = Prompts(settings)
    caption = "continue video a red circle moves right, a blue square stays in place; the camera is still."
    plain, ended = prompts([caption]), prompts([f"{caption} {KEEP}"])
    count = prompts.tokenizer.count(caption) - 1
    assert prompts.tokenizer.count(f"{caption} {KEEP}") == count + 2
    apart = (ended - plain)[0, :count].square().mean() / plain[0, :count].square().mean()
    assert apart < 2e-3  # 0.42 letter by letter
    assert add_word(imported / "prompt_tokenizer", KEEP) == add_word(imported / "prompt_tokenizer", KEEP)


def test_chains_are_made_for_the_captioner(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.chains.LINKS", 2)
    make_chains("chains21", Settings(imported, torch.device("cpu"), 5, batch=2, rate=0.0, seed=1, steps=1))
    chains = [load(file) for file in (imported / "seen" / "chains21").glob("*.pt")]
    assert 1 <= len(chains) <= 2
    for one in chains:
        assert one["levels"].shape[1:] == (8, 3, 112, 112) and len(one["levels"]) == len(one["told"]) > 0


def test_a_lora_of_four_steps_goes_on_from_the_exported_one(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distillation.FINEST", 1.0)
    settings = Settings(imported, torch.device("cpu"), 5, batch=1, rate=1e-4, seed=2, steps=1)
    encode_clips("clips21", settings)
    before = load(imported / "turbo14b_low.pt")
    train_turbo("turbo14b_low", settings)
    after = load(imported / "turbo14b_low.pt")
    assert after["steps"] == before["steps"] + 1 and after["weights"].keys() == before["weights"].keys()
    for name, value in after["weights"].items():
        torch.testing.assert_close(value, before["weights"][name], rtol=0, atol=1e-3)

    # what it is taught: two steps of the low expert, from where the high one left off
    teacher, clips = Teacher("turbo14b_low", settings), load(imported / "clips21" / "00000000.pt")
    clips = {key: value.float() if value.is_floating_point() else value for key, value in clips.items()}
    pairs = list(teacher.pairs(clips, settings.generator(3)))
    assert [float(pair["sigma"][0]) for pair in pairs] == pytest.approx(SIGMAS[2:4])
    reached = pairs[0]["latents"] + (SIGMAS[3] - SIGMAS[2]) * pairs[0]["flow"]
    torch.testing.assert_close(reached, pairs[1]["latents"], rtol=1e-4, atol=1e-4)

    # and from where its own step comes to, in half of the clips; here a step that stays where it is
    many = {key: value[:1].expand(8, *value.shape[1:]) for key, value in clips.items()}
    lazy = Teacher("turbo14b_low", settings, lambda pair: torch.zeros_like(pair["latents"]))
    first, second = lazy.pairs(many, settings.generator(3))
    stays = (first["latents"] == second["latents"]).flatten(1).all(1)
    assert 0 < stays.sum() < 8

    model = opened("dit14b_low", settings)
    plain = model.blocks[0].attn1.to_q.weight.clone()
    lora = attach(model, TURBOS["turbo14b_low"])
    assert torch.equal(model.blocks[0].attn1.to_q.weight, plain)  # a new one changes nothing
    lora.load_state_dict(before["weights"])
    assert not torch.equal(model.blocks[0].attn1.to_q.weight, plain)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_seed_and_each_step_draws_its_own(device: str) -> None:
    drawn = {
        float(torch.rand((), generator=generator, device=device))
        for seed in range(3)
        for step in range(3)
        for generator in [Settings(Path(), torch.device(device), 1, 1, 1, seed).generator(step)]
    }
    assert len(drawn) == 9


def test_scenes_to_train_on_have_more_that_passes_and_more_that_turns() -> None:
    world = scenes.sample(400, torch.Generator().manual_seed(1), hard=True)
    covered = scenes._covered(world, range(17), 10.0) > 0
    assert covered[::2].sum() > 2 * covered[1::2].sum() > 0
    turning = (world.spin != 0) & world.present
    assert turning[1::4].sum() + turning[2::4].sum() > 2 * (turning[::4].sum() + turning[3::4].sum()) > 0


def test_a_vae_sees_every_colour_at_once_in_crowds_that_turn() -> None:
    crowd = scenes.crowd(64, torch.Generator().manual_seed(1))
    assert crowd.present.all() and (crowd.colour.sort(1).values == torch.arange(len(scenes.COLOURS))).all()
    assert float((crowd.spin[crowd.shape > 0] != 0).float().mean()) > 0.75
    batch = next(clips(Settings(Path(), torch.device("cpu"), 1, 4, 0.0, 1), 0, 5))
    assert batch["pixels"].shape == (4, 3, 5, scenes.HEIGHT, scenes.WIDTH)


def test_scenes_to_measure_with_stay_the_same() -> None:
    world = scenes.sample(200, torch.Generator().manual_seed(1))
    assert (world.spin != 0).sum() == 71
    assert world.captions(0)[0] == "a blue square moves up, a purple square moves down; the camera is still."
