"""The house rules as data, and a failure that names file, line and rule.

Every rule is a function (Source) -> violations. `BROKEN` holds sources that each rule must refuse and `RIGHT`
one that it must let pass, so that no rule is green because it looks at nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "errors": 1,
    "config": 2, "log": 2,
    "ops": 3, "parallel": 3, "data": 3,
    "layers": 4, "objective": 4, "pipeline": 4, "optim": 4, "checkpoint": 4,
    "model": 5,
    "assemble": 6,
    "evaluate": 7, "plan": 7, "compress": 7, "verify": 7,
    "train": 8,
    "__main__": 9,
}  # fmt: skip

# Library -> the only files of the package that may import it (`tools` as a whole counts as a file).
ONLY_IN = {
    "torch.distributed": (
        "megads/parallel/mesh.py", "megads/parallel/bootstrap.py", "megads/parallel/collectives.py",
        "megads/parallel/control.py", "megads/pipeline/transport.py", "megads/checkpoint/save.py",
        "megads/checkpoint/load.py", "megads/train/launch.py", "tools/bench/collectives.py",
    ),
    "deepspeed": ("megads/optim/deepspeed_zero.py", "megads/parallel/bootstrap.py"),
    "apex": ("megads/ops/extension.py",),
    "mpi4py": ("megads/parallel/bootstrap.py", "tools"),
    "transformers": ("megads/checkpoint/hf.py",),
    "safetensors": ("megads/checkpoint/hf.py",),
    "pickle": ("megads/checkpoint/torch_file.py",),  # to write, and for its error
}  # fmt: skip

# Calls that read or run code from data, or go through a shell.
FORBIDDEN_CALLS = (
    "torch.load",
    "torch.save",
    "eval",
    "exec",
    "os.system",
    "yaml.load",
    "numpy.load",
    "np.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
)
# The one file that may call torch.load, with weights_only=True written out.
READS_PICKLES = "megads/checkpoint/torch_file.py"

# These, and everything of megads that they import, need no torch.
WITHOUT_TORCH = (
    "megads/__main__.py", "megads/errors.py", "megads/log.py", "megads/config/*.py",
    "megads/assemble/rules*.py", "megads/assemble/finding.py", "megads/parallel/layout.py", "megads/parallel/shard.py",
    "megads/data/order.py", "megads/pipeline/action.py",
    "megads/pipeline/schedules.py", "megads/pipeline/text.py", "megads/pipeline/lower.py", "megads/pipeline/verify.py",
    "megads/pipeline/simulate.py", "megads/pipeline/partition.py", "megads/pipeline/render.py",
    "megads/pipeline/report.py", "megads/assemble/schedule.py",
    "tools/preprocess_data.py", "tools/train_tokenizer.py", "tools/inspect_checkpoint.py",
)  # fmt: skip

FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "core", "misc")

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
# "path" or "path:function" -> (lines, why it may be longer)
FACES = {
    "megads/checkpoint/__init__.py": "megads.checkpoint.open is what scripts are promised; it needs no torch"
}
LONGER: dict[str, tuple[int, str]] = {}

MAX_ARGUMENTS = 8
MAX_POSITIONAL = 2
MAX_RETURNED = 2
# "path:function" -> why its order of more than two positional arguments needs no names
POSITIONAL = {
    "megads/ops/attention.py:attention": "the formula's q, k, v",
    "megads/layers/context.py:context_attention": "the formula's q, k, v",
    "megads/ops/norm.py:layer_norm": "the formula's x, weight, bias",
}

# Where `except Exception` without a re-raise may stand: the top frame of a rank.
BROAD_EXCEPT = ("megads/__main__.py",)

# The only place that imports modules of megads late: the table of verbs.
LATE_IMPORT = ("megads/__main__.py",)

MUTABLE_CALLS = (
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "OrderedDict",
    "Counter",
    "deque",
    "field",
)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


@dataclass(frozen=True)
class Source:
    """One Python file: its path in the repository and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """`parallel` for megads/parallel/mesh.py, `log` for megads/log.py."""
        return Path(self.path).parts[1].removesuffix(".py")

    @property
    def is_package(self) -> bool:
        return self.path.startswith("megads/")

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, full name) of everything imported, and of every dotted use of torch.distributed."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Attribute) and _dotted(node) == "torch.distributed":
                yield node.lineno, "torch.distributed"

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


Violation = tuple[int, str]
Rule = Callable[[Source], Iterator[Violation]]


def imports_go_down(source: Source) -> Iterator[Violation]:
    if not source.is_package or source.room == "__init__":
        return
    for line, name in source.imports():
        parts = name.split(".")
        if parts[0] != "megads" or len(parts) < 2 or parts[1] == source.room:
            continue
        here, there = FLOORS.get(source.room), FLOORS.get(parts[1])
        if here is None or there is None:
            yield line, f"{source.room if here is None else parts[1]} has no floor"
        elif there >= here:
            yield line, f"floor {here} ({source.room}) imports floor {there} ({parts[1]})"


def imports_are_absolute(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import"


def libraries_stay_in_their_rooms(source: Source) -> Iterator[Violation]:
    if source.is_test:
        return
    for line, name in source.imports():
        for library, files in ONLY_IN.items():
            is_allowed = source.path in files or source.path.split("/")[0] in files
            if f"{name}.".startswith(f"{library}.") and not is_allowed:
                yield line, f"{library} is imported only in {', '.join(files) or 'no file'}"


def nothing_runs_code_from_data(source: Source) -> Iterator[Violation]:
    if source.is_test:
        return
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        call = _dotted(node.func)
        is_safe = any(k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords)
        is_safe = is_safe and call == "torch.load" and source.path == READS_PICKLES
        if call in FORBIDDEN_CALLS and not is_safe:
            yield node.lineno, f"call of {call}"
        for keyword in node.keywords:
            if (
                keyword.arg in ("shell", "allow_pickle")
                and getattr(keyword.value, "value", True) is not False
            ):
                yield node.lineno, f"{keyword.arg}=True"


def own_modules_are_imported_at_the_top(source: Source) -> Iterator[Violation]:
    if source.is_test or source.path in LATE_IMPORT:
        return
    for function in source.functions():
        for node in ast.walk(function):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            elif isinstance(node, ast.Call) and _dotted(node.func) in (
                "importlib.import_module",
                "__import__",
            ):
                names = ["megads"] if "megads" in ast.unparse(node) else []
            if any(name.split(".")[0] == "megads" for name in names):
                yield node.lineno, f"{function.name} imports a module of megads"


def packages_are_empty(source: Source) -> Iterator[Violation]:
    if not source.path.endswith("__init__.py") or source.path in FACES:
        return
    for node in source.tree.body:
        text = ast.unparse(node)
        is_version = text.startswith("__version__ = ") or isinstance(node, ast.Expr)
        if not (source.path == "megads/__init__.py" and is_version):
            yield node.lineno, f"__init__.py holds {text.splitlines()[0]}"


def files_say_what_they_hold(source: Source) -> Iterator[Violation]:
    if not source.path.endswith("__init__.py") and not ast.get_docstring(source.tree):
        yield 1, "no docstring at the top of the file"


def files_and_functions_are_short(source: Source) -> Iterator[Violation]:
    lines = len(source.text.splitlines())
    limit, _ = LONGER.get(source.path, (MAX_FILE_LINES, ""))
    if lines > limit:
        yield limit, f"{lines} lines (at most {limit})"
    for function in source.functions():
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        limit, _ = LONGER.get(f"{source.path}:{function.name}", (MAX_FUNCTION_LINES, ""))
        if lines > limit:
            yield function.lineno, f"{function.name} has {lines} lines (at most {limit})"


def names_say_something(source: Source) -> Iterator[Violation]:
    for part in Path(source.path).with_suffix("").parts:
        if part.removeprefix("test_") in FORBIDDEN_NAMES:
            yield 1, f"{part} is no name for a file or folder"


def modules_hold_no_mutable_state(source: Source) -> Iterator[Violation]:
    if source.is_test:
        return
    for scope in ast.walk(source.tree):
        if isinstance(scope, ast.Global):
            yield scope.lineno, f"global {', '.join(scope.names)}"
        if isinstance(scope, ast.Module | ast.ClassDef):
            marks = [ast.unparse(mark).partition("(")[0] for mark in getattr(scope, "decorator_list", ())]
            is_dataclass = bool({"dataclass", "dataclasses.dataclass", "section"} & set(marks))
            for node in scope.body:
                value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
                if value is not None and _is_mutable(value, in_dataclass=is_dataclass):
                    yield node.lineno, "a mutable value that lives as long as the module or class"


def nothing_is_unfinished(source: Source) -> Iterator[Violation]:
    if source.path == "tests/test_house.py":
        return
    for line, text in enumerate(source.text.splitlines(), 1):
        if found := UNFINISHED.search(text):
            yield line, found.group()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError"


def errors_are_not_swallowed(source: Source) -> Iterator[Violation]:
    if source.is_test or source.path in BROAD_EXCEPT:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = (
                {"BaseException"} if node.type is None else set(re.findall(r"\w+", ast.unparse(node.type)))
            )
            is_raised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if kinds & {"Exception", "BaseException"} and not is_raised:
                yield node.lineno, "a broad except that does not raise"


def signatures_are_readable(source: Source) -> Iterator[Violation]:
    if source.is_test:
        return
    autograd = {
        id(function)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and any(_dotted(base).endswith("Function") for base in node.bases)
        for function in node.body
    }
    for function in source.functions():
        if function.name.startswith("_") or id(function) in autograd:
            continue
        positional = [
            a for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")
        ]
        problems = []
        if len(positional) + len(function.args.kwonlyargs) > MAX_ARGUMENTS:
            problems.append(f"more than {MAX_ARGUMENTS} arguments")
        if len(positional) > MAX_POSITIONAL and f"{source.path}:{function.name}" not in POSITIONAL:
            problems.append(f"more than {MAX_POSITIONAL} positional arguments")
        if any(argument.annotation and ast.unparse(argument.annotation) == "bool" for argument in positional):
            problems.append("a bool that is not keyword-only")
        if function.returns and len(_tuple_items(function.returns)) > MAX_RETURNED:
            problems.append(f"a tuple of more than {MAX_RETURNED} returned (a frozen dataclass has names)")
        yield from ((function.lineno, f"{function.name}: {problem}") for problem in problems)


RULES: tuple[Rule, ...] = (
    imports_go_down,
    imports_are_absolute,
    libraries_stay_in_their_rooms,
    nothing_runs_code_from_data,
    own_modules_are_imported_at_the_top,
    packages_are_empty,
    files_say_what_they_hold,
    files_and_functions_are_short,
    names_say_something,
    modules_hold_no_mutable_state,
    nothing_is_unfinished,
    errors_are_not_swallowed,
    signatures_are_readable,
)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for a name or attribute chain, else empty."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (parent := _dotted(node.value)):
        return f"{parent}.{node.attr}"
    return ""


def _tuple_items(kind: ast.expr) -> list[ast.expr]:
    """The members of an annotation `tuple[...]`."""
    if (
        isinstance(kind, ast.Subscript)
        and _dotted(kind.value) == "tuple"
        and isinstance(kind.slice, ast.Tuple)
    ):
        return kind.slice.elts
    return []


def _is_mutable(value: ast.expr, *, in_dataclass: bool) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    name = _dotted(value.func).rpartition(".")[2]
    return name in MUTABLE_CALLS and not (in_dataclass and name == "field")


def _sources() -> list[Source]:
    paths = [
        path for folder in ("megads", "tools", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    paths += sorted(ROOT.glob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule: Rule) -> None:
    told = [
        f"{source.path}:{line}: {rule.__name__}: {problem}"
        for source in _sources()
        for line, problem in rule(source)
    ]
    assert not told, "\n" + "\n".join(told)


def _torch_chain(path: str, sources: dict[str, Source], seen: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The chain of imports at the top of files that leads from `path` to torch; None if none does."""
    chain = (*seen, path)
    for node in sources[path].tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "torch":
                return (*chain, "torch")
            other = name.replace(".", "/") + ".py"
            if other in sources and other not in chain and (found := _torch_chain(other, sources, chain)):
                return found
    return None


def test_arithmetic_and_checks_need_no_torch() -> None:
    sources = {source.path: source for source in _sources()}
    paths = [path for path in sources if any(Path(path).match(pattern) for pattern in WITHOUT_TORCH)]
    chains = [" -> ".join(chain) for path in paths if (chain := _torch_chain(path, sources))]
    assert not chains, "\n" + "\n".join(chains)


def test_a_chain_to_torch_is_found() -> None:
    files = {
        "megads/a.py": "from megads import b",
        "megads/b.py": "import megads.c\nimport megads.a",
        "megads/c.py": "from torch import nn",
        "megads/d.py": "def f():\n    import torch",
    }
    sources = {path: Source(path, text) for path, text in files.items()}
    assert _torch_chain("megads/a.py", sources) == ("megads/a.py", "megads/b.py", "megads/c.py", "torch")
    assert _torch_chain("megads/d.py", sources) is None


# rule -> (path, source) that it refuses, with the line; and one that it must let pass.
BROKEN: dict[str, list[tuple[str, str, int]]] = {
    "imports_go_down": [
        ("megads/ops/x.py", "import torch\nfrom megads.layers.norm import f", 2),
        ("megads/ops/x.py", "import megads.parallel.mesh", 1),
        ("megads/config/x.py", "from megads import log", 1),
        ("megads/model/x.py", "def f():\n    from megads.train import step", 2),
        ("megads/ops/x.py", "from megads.cellar import f", 1),
    ],
    "imports_are_absolute": [("megads/ops/x.py", "from .y import f", 1)],
    "libraries_stay_in_their_rooms": [
        ("megads/layers/x.py", "import torch.distributed as dist", 1),
        ("megads/layers/x.py", "from torch import distributed", 1),
        ("megads/layers/x.py", "from torch.distributed import all_reduce", 1),
        ("megads/layers/x.py", "import torch\n\nx = torch.distributed.get_rank()", 3),
        ("megads/train/x.py", "import deepspeed.ops", 1),
        ("megads/ops/x.py", "def f():\n    import apex", 2),
        ("megads/data/x.py", "from mpi4py import MPI", 1),
        ("tools/x.py", "import transformers", 1),
        ("megads/checkpoint/x.py", "import pickle", 1),
    ],
    "nothing_runs_code_from_data": [
        ("megads/checkpoint/x.py", "import torch\nx = torch.load('a')", 2),
        ("megads/checkpoint/x.py", "torch.load('a', weights_only=True)", 1),
        (READS_PICKLES, "torch.load('a', weights_only=False)", 1),
        (READS_PICKLES, "pickle.loads(a)", 1),
        ("tools/x.py", "subprocess.run('ls', shell=True)", 1),
        ("megads/data/x.py", "numpy.fromfile(a, allow_pickle=is_old)", 1),
    ],
    "own_modules_are_imported_at_the_top": [
        ("megads/train/x.py", "def f():\n    import megads.errors", 2),
        ("megads/train/x.py", "class A:\n    def f(self):\n        from megads import errors", 3),
        ("tools/x.py", "def f():\n    importlib.import_module('megads.errors')", 2),
    ],
    "packages_are_empty": [
        ("megads/ops/__init__.py", "from megads.ops.norm import f", 1),
        ("megads/__init__.py", "__version__ = '1'\nimport os", 2),
    ],
    "files_say_what_they_hold": [("megads/ops/x.py", "import os", 1)],
    "files_and_functions_are_short": [
        ("megads/ops/x.py", "\n" * (MAX_FILE_LINES + 1), MAX_FILE_LINES),
        ("megads/ops/x.py", "\ndef f():\n" + "    f()\n" * MAX_FUNCTION_LINES, 2),
    ],
    "names_say_something": [
        ("megads/utils/x.py", "", 1),
        ("megads/ops/common.py", "", 1),
        ("tests/helpers.py", "", 1),
    ],
    "modules_hold_no_mutable_state": [
        ("megads/ops/x.py", "import os\nCACHE = {}", 2),
        ("megads/ops/x.py", "CACHE: dict[str, int] = dict()", 1),
        ("megads/ops/x.py", "X = [n for n in 'abc']", 1),
        ("megads/ops/x.py", "class A:\n    seen = set()", 2),
        ("megads/ops/x.py", "MESH = None\ndef f():\n    global MESH", 3),
        ("megads/ops/x.py", "X = collections.defaultdict(list)", 1),
    ],
    "nothing_is_unfinished": [
        ("megads/ops/x.py", "x = 1\n# TODO: more", 2),
        ("megads/ops/x.py", "def f():\n    raise NotImplementedError", 2),
    ],
    "errors_are_not_swallowed": [
        ("megads/ops/x.py", "try:\n    f()\nexcept Exception:\n    pass", 3),
        ("megads/ops/x.py", "try:\n    f()\nexcept (ValueError, BaseException):\n    x = 1", 3),
        ("megads/ops/x.py", "try:\n    f()\nexcept:\n    x = 1", 3),
    ],
    "signatures_are_readable": [
        ("megads/ops/x.py", "def f(a, b, c): ...", 1),
        ("megads/ops/x.py", "def f(a, *, b, c, d, e, f, g, h, i): ...", 1),
        ("megads/ops/x.py", "def f(a, b: bool): ...", 1),
        ("megads/ops/x.py", "def f() -> tuple[int, int, int]: ...", 1),
    ],
}

RIGHT = {
    "imports_go_down": (
        "megads/model/x.py",
        "from megads.layers.norm import f\nfrom megads.model.block import g",
    ),
    "imports_are_absolute": ("megads/ops/x.py", "from megads.ops.y import f"),
    "libraries_stay_in_their_rooms": ("megads/parallel/mesh.py", "import torch.distributed\nimport apexes"),
    "nothing_runs_code_from_data": ("megads/ops/x.py", "x.eval()\nrun(a, shell=False)\njson.load(f)"),
    "own_modules_are_imported_at_the_top": (
        "megads/ops/x.py",
        "import megads.errors\ndef f():\n    import numpy",
    ),
    "packages_are_empty": ("megads/ops/__init__.py", ""),
    "files_say_what_they_hold": ("megads/ops/x.py", '"""What lives here."""'),
    "files_and_functions_are_short": (
        "megads/ops/x.py",
        "def f():\n" + "    f()\n" * (MAX_FUNCTION_LINES - 1),
    ),
    "names_say_something": ("megads/ops/score.py", ""),
    "modules_hold_no_mutable_state": (
        "megads/ops/x.py",
        "X = (1, 2)\nY = MappingProxyType({1: 2})\nZ = frozenset()\ndef f():\n    x = []\n"
        "@dataclass\nclass A:\n    x: list = field(default_factory=list)",
    ),
    "nothing_is_unfinished": ("megads/ops/x.py", "x = 'done'"),
    "errors_are_not_swallowed": (
        "megads/ops/x.py",
        "try:\n    f()\nexcept Exception as e:\n    raise A from e",
    ),
    "signatures_are_readable": (
        "megads/ops/x.py",
        "class A(torch.autograd.Function):\n    def forward(ctx, x, y, z): ...\n"
        "class B:\n    def f(self, a, b, *, c: bool) -> tuple[int, ...]: ...\ndef _g(a, b, c, d): ...",
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_can_fail_and_pass(rule: Rule) -> None:
    for path, text, line in BROKEN[rule.__name__]:
        lines = [found for found, _ in rule(Source(path, text))]
        assert lines == [line], (path, text, lines)
    path, text = RIGHT[rule.__name__]
    assert list(rule(Source(path, text))) == []


def test_the_lists_name_files_that_could_exist() -> None:
    rooms = {
        path.name.removesuffix(".py") for path in (ROOT / "megads").iterdir() if not path.name.startswith("_")
    }
    assert rooms - FLOORS.keys() - {"py.typed"} == set()
    for path in (*LONGER, *POSITIONAL):
        file, _, function = path.partition(":")
        assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).exists(), path
