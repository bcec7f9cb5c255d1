"""The file as a whole: its map, its order, its I/O line, its hosts."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiclient_api

FILE = Path(aiclient_api.__file__)
TEXT = FILE.read_text("utf-8")
TREE = ast.parse(TEXT)
DOCSTRING = ast.get_docstring(TREE) or ""
BANNER = re.compile(r"^# ---- (\d+)\. (.+?) -+$", re.MULTILINE)
IO_LINE = re.compile(r"^# ==== the I/O line =+$", re.MULTILINE)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def line_of(pattern: re.Pattern[str]) -> int:
    """The line of the first match."""
    match = pattern.search(TEXT)
    assert match, pattern.pattern
    return TEXT.count("\n", 0, match.start()) + 1


def sections() -> list[tuple[int, str]]:
    """(line, name) of each banner."""
    return [(TEXT.count("\n", 0, m.start()) + 1, m[2]) for m in BANNER.finditer(TEXT)]


def section_at(line: int) -> int:
    """The number of the section a line stands in; 0 for the head of the file."""
    return sum(start <= line for start, _ in sections())


# ---- the map -----------------------------------------------------------------------------------


def test_the_map_in_the_docstring_is_the_order_of_the_banners() -> None:
    """It is the only architecture document that everyone opens."""
    rows = re.findall(r"^ {3,4}(\d+|==)  (\S(?:.*?\S)?)(?: {2,}|: )", DOCSTRING, re.MULTILINE)
    marks = [(m.start(), (m[1], m[2])) for m in BANNER.finditer(TEXT)]
    found = IO_LINE.search(TEXT)
    assert found
    marks.append((found.start(), ("==", "the I/O line")))
    assert rows == [mark for _, mark in sorted(marks)]


def test_sections_are_numbered_from_one() -> None:
    """Without a gap."""
    numbers = [int(match[1]) for match in BANNER.finditer(TEXT)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_banners_are_one_width_and_ascii() -> None:
    """Greppable from any keyboard."""
    lines = [line for line in TEXT.splitlines() if re.match(r"# (----|====)", line)]
    assert len({len(line) for line in lines}) == 1
    assert all(line.isascii() for line in lines)


# ---- the order ---------------------------------------------------------------------------------


def bound_names(node: ast.stmt) -> list[str]:
    """The names a top-level statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.If):
        return [name for inner in [*node.body, *node.orelse] for name in bound_names(inner)]
    return []


def definitions() -> dict[str, ast.stmt]:
    """The first statement that binds each top-level name."""
    found: dict[str, ast.stmt] = {}
    for node in TREE.body:
        for name in bound_names(node):
            found.setdefault(name, node)
    return found


def names_in(node: ast.AST) -> Iterator[ast.Name]:
    """The names an expression or body reads; annotations are never evaluated here."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node
    for key, value in ast.iter_fields(node):
        if key in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from names_in(child)


def evaluated_at_once(node: ast.stmt) -> Iterator[ast.Name]:
    """The names that running a top-level statement reads: bodies of functions are not run."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        defaults = [item for item in node.args.kw_defaults if item]
        for default in [*node.decorator_list, *node.args.defaults, *defaults]:
            yield from names_in(default)
    elif isinstance(node, ast.ClassDef):
        for part in [*node.decorator_list, *node.bases, *node.keywords]:
            yield from names_in(part)
        for inner in node.body:
            yield from evaluated_at_once(inner)
    elif isinstance(node, ast.If):
        yield from names_in(node.test)
        for inner in [*node.body, *node.orelse]:
            yield from evaluated_at_once(inner)
    else:
        yield from names_in(node)


def test_nothing_is_evaluated_above_its_definition() -> None:
    """Module level, class bodies, decorators, defaults: what they name stands above them."""
    defined = definitions()
    early = [
        f"line {name.lineno}: {name.id} is defined in line {defined[name.id].lineno}"
        for node in TREE.body
        for name in evaluated_at_once(node)
        if name.id in defined and defined[name.id].lineno > name.lineno
    ]
    assert not early, "\n".join(early)


def local_names(function: ast.AST) -> set[str]:
    """What a function binds itself: a local of the same name is not the top-level one."""
    bound = {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    stored = (ast.Store, ast.Del)
    return bound | {
        n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, stored)
    }


def functions_of(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods at the top of a statement, not those inside of functions."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    elif isinstance(node, (ast.ClassDef, ast.If)):
        for inner in node.body:
            yield from functions_of(inner)


def test_functions_name_later_only_functions_and_classes_of_their_own_section() -> None:
    """A reader never has to look below the section for what a function uses."""
    defined = definitions()
    early = []
    for function in (f for node in TREE.body for f in functions_of(node)):
        own = local_names(function)
        for name in names_in(function):
            target = defined.get(name.id)
            if target is None or name.id in own or target.lineno <= name.lineno:
                continue
            later = section_at(target.lineno) > section_at(name.lineno)
            if later or not isinstance(target, Definition):
                early.append(f"line {name.lineno}: {name.id}, defined in line {target.lineno}")
    assert not early, "\n".join(early)


def test_no_top_level_name_is_defined_twice() -> None:
    """In one namespace of hundreds of names the second one silently wins."""
    seen: dict[str, int] = {}
    twice = []
    for node in TREE.body:
        if isinstance(node, ast.If):
            continue  # types and lazy modules: one of two branches
        for name in bound_names(node):
            if name in seen:
                twice.append(f"{name}: lines {seen[name]} and {node.lineno}")
            seen[name] = node.lineno
    assert not twice, "\n".join(twice)


def test_no_top_level_name_hides_a_builtin() -> None:
    """`open` or `filter` redefined would be found by nobody."""
    assert not set(definitions()) & set(dir(builtins)) - {"__doc__", "__name__"}


# ---- the I/O line ------------------------------------------------------------------------------

FORBIDDEN = {
    "asyncio",
    "breakpoint",
    "eval",
    "exec",
    "input",
    "open",
    "os",
    "print",
    "random",
    "secrets",
    "select",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}
FORBIDDEN_ATTRIBUTES = {"uuid.uuid1", "uuid.uuid4", "urllib.request", "sys.stdout", "sys.stderr"}


def is_read(node: ast.Name) -> bool:
    """Whether a name is used, not bound: a field may be called `input`."""
    return isinstance(node.ctx, ast.Load)


def above_the_line() -> list[ast.stmt]:
    """The statements between the first banner and the I/O line."""
    first, last = sections()[0][0], line_of(IO_LINE)
    return [node for node in TREE.body if first < node.lineno < last]


def test_above_the_line_nothing_waits() -> None:
    """No `await`, no `async`, no `yield` to an event loop."""
    waiting = (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.AsyncFunctionDef)
    found = [n for node in above_the_line() for n in ast.walk(node) if isinstance(n, waiting)]
    assert not found, [node.lineno for node in found]


def test_above_the_line_nothing_touches_the_world() -> None:
    """No socket, file, clock, randomness, terminal or process."""
    found = []
    for node in (inner for top in above_the_line() for inner in ast.walk(top)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN and is_read(node):
            found.append(f"line {node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_ATTRIBUTES:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_imports_stand_in_one_block() -> None:
    """The costly ones are loaded late in one visible way, not here and there."""
    first = sections()[0][0]
    imports = [n for n in ast.walk(TREE) if isinstance(n, (ast.Import, ast.ImportFrom))]
    late = [f"line {n.lineno}: {ast.unparse(n)}" for n in imports if n.lineno > first]
    assert not late, "\n".join(late)


LAZY = dict(re.findall(r'^    ([\w.]+) = lazy_module\("(.+)"\)$', TEXT, re.MULTILINE))
ONLY_THE_COMMAND_LINE = 20  # has one thread


def test_what_threads_use_is_loaded_before_there_are_any() -> None:
    """A module that is loaded late must not be loaded by two threads at once."""
    (runner,) = (n for n in TREE.body if getattr(n, "name", "") == "run_in_loop")
    early = {ast.unparse(n) for n in ast.walk(runner) if isinstance(n, (ast.Name, ast.Attribute))}
    found = [n for node in TREE.body for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    late = {
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in found
        if ast.unparse(node.value) in LAZY.keys() - early
        and 0 < section_at(node.lineno) < ONLY_THE_COMMAND_LINE
    }
    assert LAZY and not late, "\n".join(sorted(late))


def test_no_module_is_lazy_any_more_once_the_loop_runs() -> None:
    code = (
        "import sys, aiclient_api as g\n"
        "async def work(): return [n for n, m in sys.modules.items()"
        " if type(m).__name__ == '_LazyModule']\n"
        "print(*g.run_in_loop(work()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FILE.parent, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {"argparse", "csv", "getpass", "plistlib"}


# ---- hosts -------------------------------------------------------------------------------------

HOST = re.compile(r"(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:com|dev|io|net|org|ai)(?![\w-])", re.IGNORECASE)


def string_constants() -> Iterator[ast.Constant]:
    """Every string of the file but docstrings."""
    documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    docstrings = {id(n.body[0]) for n in ast.walk(TREE) if isinstance(n, documented)}
    inside = {
        id(n.value) for n in ast.walk(TREE) if isinstance(n, ast.Expr) and id(n) in docstrings
    }
    for node in ast.walk(TREE):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node


def test_hosts_in_the_code_are_those_in_the_docstring() -> None:
    """Whoever copies the file reads there what it may contact."""
    named = {host.lower() for host in HOST.findall(DOCSTRING)}
    assert "api.github.com" in named
    strange = [
        f"line {node.lineno}: {host}"
        for node in string_constants()
        for host in HOST.findall(str(node.value))
        if not any(host.lower() == name or host.lower().endswith("." + name) for name in named)
    ]
    assert not strange, "\n".join(strange)


# ---- old Pythons -------------------------------------------------------------------------------


def test_the_grammar_is_that_of_python_3_9() -> None:
    """So that an old Python reaches the guard and can say why."""
    ast.parse(TEXT, feature_version=(3, 9))
    newer = [n for n in ast.walk(TREE) if type(n).__name__ in ("Match", "TryStar", "TypeAlias")]
    assert not newer


def old_python(version: str) -> str | None:
    """An interpreter of this version, where there is one."""
    folders = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(f"python{version}", path=path)


@pytest.mark.parametrize("version", ["3.9", "3.10"])
@pytest.mark.parametrize("arguments", [[], ["--version"], ["start", "--foreground"]])
def test_an_old_python_is_told_in_one_sentence(version: str, arguments: list[str]) -> None:
    """Not by a traceback in line 2,300."""
    python = old_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    done = subprocess.run(
        [python, str(FILE), *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf".*needs Python 3\.11 or newer.* {version}\.\d+.*\.\n", done.stderr)


def test_the_copied_file_states_that_it_needs_nothing() -> None:
    """PEP 723, and only the standard library is imported."""
    head = TEXT[: TEXT.index('"""')]
    assert 'requires-python = ">=3.11"' in head and "dependencies = []" in head
