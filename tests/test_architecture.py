"""The house as docs/DESIGN.md draws it: imports point one way, and policy has an address."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.golden import ROOT

FILES = sorted((ROOT / "wan").rglob("*.py"))

# A module may import its own layer and those above it in this list.
LAYERS = [
    ("wan.version", "wan.errors", "wan.files", "wan.foreign", "wan.detail", "wan.pages"),
    ("wan.public",),
    ("wan.configs",),
    ("wan.kinds",),
    ("wan.options",),
    ("wan.settings", "wan.sizes"),
    ("wan.pictures", "wan.types", "wan.compat", "wan.timeline"),
    (
        "wan.device.ranks",
        "wan.device.peers",
        "wan.device.watch",
        "wan.device.parallel",
        "wan.device.shared",
        "wan.device.sharding",
        "wan.device.hardware",
        "wan.device.host",
        "wan.device.layers",
        "wan.device.streaming",
        "wan.device.placement",
    ),
    ("wan.weights",),
    ("wan.media", "wan.denoiser", "wan.vae", "wan.text", "wan.captioner", "wan.quality"),
    (
        "wan.modules",
        "wan.device.budget",
        "wan.device.host_budget",
        "wan.footage",
        "wan.handoff",
        "wan.upscaling",
        "wan.colour_carry",
        "wan.comfy",
        "wan.stopwatch",
    ),
    ("wan.models", "wan.background", "wan.prompting", "wan.chain.plan", "wan.encoding"),
    ("wan.clip_sampler", "wan.sampling_rules", "wan.fitted_frames", "wan.caption_helpers"),
    ("wan.planning", "wan.candidates"),
    ("wan.pipeline",),
    ("wan.experts",),
    ("wan.image2video", "wan.textimage2video", "wan.text2video", "wan.continuation"),
    ("wan.video2video", "wan.wan22video2video5B"),
    ("wan.chain",),
    ("wan.commands",),
    ("wan.server",),
    ("wan.batch",),
    ("wan.cli",),
    ("wan.server.__main__",),
]
# Neighbours of one layer that may not know each other.
APART = ["wan.media", "wan.denoiser", "wan.vae", "wan.text", "wan.captioner", "wan.quality"]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "wan"}


def part(name: str) -> str | None:
    parts = sorted((entry for layer in LAYERS for entry in layer), key=len, reverse=True)
    return next((entry for entry in parts if name == entry or name.startswith(entry + ".")), None)


def layer(name: str) -> int:
    return next(index for index, entries in enumerate(LAYERS) if name in entries)


def test_every_module_has_a_layer() -> None:
    assert {
        name_of(file) for file in FILES if name_of(file) not in ("wan", "wan.device") and part(name_of(file)) is None
    } == set()


def test_the_map_names_every_module() -> None:
    design = (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1]: row for row in design.splitlines() if row.startswith("| `wan/")}
    lost = []
    for file in FILES:
        path = file.relative_to(ROOT)
        folder = next((row for name, row in rows.items() if f"`{path.parent.as_posix()}/`" in name), "")
        named = f"`{file.name}`" in folder or any(f"`{path.as_posix()}`" in name for name in rows)
        if not named and file.stem[0] != "_" and path.parts[1] not in ("modules", "version.py"):
            lost.append(path.as_posix())
    assert lost == []
    files = {file.name for file in FILES}
    stale = [
        name for row in rows.values() for name in re.findall(r"`(?:[\w]+/)*([\w]+\.py)`", row) if name not in files
    ]
    assert stale == []


def test_imports_point_one_way() -> None:
    wrong = []
    for file in FILES:
        importer = part(name_of(file))
        for name in imports_of(file):
            imported = part(name)
            if importer is None or imported is None or imported == importer:
                continue
            if layer(imported) > layer(importer) or (importer in APART and imported in APART):
                wrong.append(f"{name_of(file)} imports {name}")
    assert wrong == []


def test_policy_has_an_address() -> None:
    homes = {
        # the server's own programs answer it on stdout
        r"\bprint\(": {"wan/cli.py", "wan/commands/", "wan/server/decode.py", "wan/server/plan.py"},
        r"empty_cache|\.cuda\(\)|cuda\.synchronize": {"wan/device/hardware.py"},
        r"\bimport av\b|from av\b": {"wan/media/"},
        r"\bargparse\b": {"wan/commands/"},
        r"os\.environ": {
            *("wan/cli.py", "wan/commands/job.py", "wan/commands/gpus.py", "wan/captioner/endpoint.py"),
            *("wan/server/main.py", "wan/server/worker.py", "wan/server/processes.py"),
            *("wan/batch/hand.py", "wan/batch/crew.py"),
        },
        r"torch\.load\(|safe_open\(": {
            "wan/weights/reading.py",
            "wan/weights/tensors.py",
            "wan/device/parallel.py",
            "wan/captioner/",
            "wan/chain/",
            "wan/server/folders.py",  # without PyTorch
        },
    }
    wrong = []
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        for pattern, allowed in homes.items():
            if re.search(pattern, file.read_text(encoding="utf-8")) and not any(
                path.startswith(home) for home in allowed
            ):
                wrong.append(f"{pattern} in {path}")
    assert wrong == []


def modules_imported_by(file: Path) -> set[str]:
    """The modules of the project that a file imports, for type checkers and inside functions too."""
    known = {name_of(other) for other in FILES}
    return {
        name if name in known else name.rpartition(".")[0]
        for name in imports_of(file)
        if name in known or name.rpartition(".")[0] in known
    } - {name_of(file)}


def test_no_file_imports_itself_through_others() -> None:
    left = {name_of(file): modules_imported_by(file) for file in FILES}
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    while roots := left.keys() - {needed for all_needed in left.values() for needed in all_needed}:
        left = {name: needed for name, needed in left.items() if name not in roots}
    assert {name: sorted(needed & left.keys()) for name, needed in left.items()} == {}


def first_imports(file: Path) -> set[str]:
    """What a file imports when it is imported itself: not for type checkers, and not inside functions."""
    names: set[str] = set()
    left: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not for_checkers and not isinstance(node, ast.FunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return names | {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}


def test_a_plan_is_made_without_what_computes() -> None:
    """diffusers and the slices of weights take seconds to import, which `dry_run` need not wait for."""
    files = {name_of(file): file for file in FILES}
    left = ["wan.commands.generate", "wan.commands.continuous", "wan.video2video", "wan.wan22video2video5B"]
    reached: dict[str, set[str]] = {}
    while left:
        name = left.pop()
        if name in files and name not in reached:
            reached[name] = first_imports(files[name])
            left += reached[name]
    assert "wan.pipeline" in reached and "wan.clip_sampler" not in reached
    packages = {"diffusers", "transformers", "torch.distributed.fsdp", "torch.distributed.tensor"}
    assert {name: taken for name, names in reached.items() if (taken := packages & names)} == {}


# What CPython has on POSIX systems only. Most people who make videos at home are on Windows.
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {
        *("chown", "chroot", "fchdir", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid"),
        *("getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown"),
        *("mkfifo", "mknod", "nice", "openpty", "pathconf", "pread", "pwrite", "posix_fadvise", "posix_fallocate"),
        *("posix_spawn", "sched_getaffinity", "sched_setaffinity", "sendfile", "setgid", "setpgid", "setpriority"),
        *("setsid", "setuid", "statvfs", "sync", "sysconf", "uname", "wait3", "wait4", "O_DIRECTORY", "O_NOFOLLOW"),
        *("O_NONBLOCK", "O_SYNC", "O_CLOEXEC"),
    },
    "signal": {"SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "setitimer", "pause"},
    "time": {"tzset"},
    "socket": {"AF_UNIX"},
}


def posix_only(code: str) -> list[str]:
    """What code imports, or names of a module, that Windows lacks; and text files in whatever encoding it has there."""
    lacking: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            lacking += [alias.name for alias in node.names if alias.name in POSIX_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            lacking += [node.module] if node.module in POSIX_MODULES else []
            lacking += [f"{node.module}.{name}" for name in names if name in POSIX_NAMES.get(node.module or "", ())]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lacking += [f"{node.value.id}.{node.attr}"] if node.attr in POSIX_NAMES.get(node.value.id, ()) else []
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if called in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
                given = {word.arg for word in node.keywords}
                lacking += [called] if "encoding" not in given else []
    return lacking


def test_nothing_is_for_posix_only() -> None:
    assert {name_of(file): names for file in FILES if (names := posix_only(file.read_text(encoding="utf-8")))} == {}


def test_what_is_for_posix_only_is_found() -> None:
    code = "import fcntl, os\nfrom os import fork\nfrom resource import getrusage\nos.sysconf('x')\npath.read_text()"
    assert sorted(posix_only(code)) == ["fcntl", "os.fork", "os.sysconf", "read_text", "resource"]


# Words that say nothing of what they stand for.
NO_NAMES = {"found", "said", "there", "own"}


def names_bound_in(tree: ast.AST) -> set[str]:
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    attributes = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return {name.strip("_") for name in stored | defined | arguments | attributes}


def test_a_name_says_what_it_stands_for() -> None:
    assert names_bound_in(ast.parse("def _said(own): self.found = there = 1")) >= NO_NAMES
    files = [
        *FILES,
        *(file for folder in ("benchmarks", "training", "tests") for file in (ROOT / folder).rglob("*.py")),
    ]
    wrong = {
        file.relative_to(ROOT).as_posix(): sorted(names & NO_NAMES)
        for file in files
        if (names := names_bound_in(ast.parse(file.read_text(encoding="utf-8")))) & NO_NAMES
    }
    assert wrong == {}


# Classes with fields that change while they are used. All other dataclasses are values.
CHANGING = {
    *(
        "wan/batch/crew.py _Member",
        "wan/batch/hand.py _Work",
        "wan/batch/schedule.py Task",
        "wan/chain/charts.py Chart",
    ),
    *("wan/device/peers.py Peer", "wan/device/watch.py Watch", "wan/server/bodies.py Body", "wan/server/live.py Live"),
    "wan/upscaling.py Upscaler",
}


def test_a_value_cannot_be_changed() -> None:
    changing = {
        f"{file.relative_to(ROOT).as_posix()} {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for one in map(ast.unparse, node.decorator_list)
        if one.removeprefix("dataclasses.").startswith("dataclass") and "frozen=True" not in one
    }
    assert changing == CHANGING
