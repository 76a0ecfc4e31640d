"""Mutation testing of the heart: each small mistake in it has to be noticed by some test.

    python -m pip install -e '.[test,mutation]' && python tools/mutation/mutate.py

makes its own copies of the project in a temporary folder, puts one mistake after the other into
them, and runs the tests. It ends with status 1 if a mutant survives that is not explained in
SURVIVORS.md. What is mutated and which tests are run stands in mutation.toml.

What must live here: the operators that Cosmic Ray does not have, and who runs when.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = Path("src/aiosync")
CONFIG = tomllib.loads((HERE / "mutation.toml").read_text("utf-8"))
SURVIVORS = HERE / "SURVIVORS.md"
MEMORY = 4 << 30


# -- Operators.


def _in_function(node: Any) -> Any:
    """Return the function that `node` is in, or None."""
    while node is not None and node.type != "funcdef":
        node = node.parent
    return node


def _is_statement(node: Any) -> bool:
    """Tell whether `node` is a statement of one line inside a function that does something."""
    return (
        node.type == "simple_stmt"
        and node.children[0].type not in ("string", "strings")
        and node.children[0].get_code(include_prefix=False) != "pass"
        and _in_function(node) is not None
    )


def _is_private(node: Any) -> bool:
    """Tell whether all that the statement changes is local variables."""
    statement = node.children[0]
    kinds = ("name", "testlist_star_expr")
    return statement.type == "expr_stmt" and statement.children[0].type in kinds


class Deletion(Operator):  # type: ignore[misc,unused-ignore]
    """Leave out a statement."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if _is_statement(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.get_first_leaf().prefix
        node.children[0] = Keyword("pass", node.start_pos, prefix)
        return node

    @classmethod
    def examples(cls) -> Any:
        return ()


class Swap(Operator):  # type: ignore[misc,unused-ignore]
    """Let two statements change places: who publishes has to do so first, and look second."""

    def _pairs(self, node: Any) -> list[int]:
        if node.type != "suite" or _in_function(node) is None:
            return []
        if _in_function(node).name.value in CONFIG["operators"]["unordered"]:
            return []
        return [
            i
            for i, (one, other) in enumerate(pairwise(node.children))
            if _is_statement(one)
            and other.type in ("simple_stmt", "if_stmt")
            and not (_is_private(one) and _is_private(other))
            # Or else it would be a deletion.
            and other.children[0].type not in ("return_stmt", "raise_stmt", "keyword")
        ]

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        for i in self._pairs(node):
            yield node.children[i].start_pos, node.children[i + 1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        i = self._pairs(node)[index]
        node.children[i : i + 2] = node.children[i + 1], node.children[i]
        return node

    @classmethod
    def examples(cls) -> Any:
        return ()


class Operand(Operator):  # type: ignore[misc,unused-ignore]
    """Leave out one of the conditions that are joined by ``and`` or ``or``."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in ("and_test", "or_test"):
            for operand in node.children[::2]:
                yield operand.start_pos, operand.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.get_first_leaf().prefix
        begin = max(2 * index - 1, 0)
        del node.children[begin : begin + 2]
        node.get_first_leaf().prefix = prefix
        return node

    @classmethod
    def examples(cls) -> Any:
        return ()


def operators() -> Iterator[Any]:
    pattern = re.compile("|".join(CONFIG["operators"]["cosmic_ray"]))
    for name in sorted(cosmic_ray.plugins.operator_names()):
        if pattern.fullmatch(name.removeprefix("core/")):
            yield cosmic_ray.plugins.get_operator(name)()
    yield from (Deletion(), Swap(), Operand())


# -- Mutants.


@dataclass(frozen=True)
class Mutant:
    """A mistake: where it is, what it changes, and the whole text of the file with it."""

    title: str  # as in SURVIVORS.md
    diff: str
    file: str
    code: str

    @property
    def key(self) -> tuple[str, str]:
        """What it is known by, whatever else changes in the file."""
        return self.title, " ".join(self.diff.split())

    def __str__(self) -> str:
        return f"### {self.title}\n\n```diff\n{self.diff}\n```\n"


_NEGATED = {ast.Is: ast.IsNot, ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.Gt: ast.LtE}
_NEGATED |= {negated: operator for operator, negated in _NEGATED.items()}


class _Bare(ast.NodeTransformer):
    """Takes away what makes no difference: annotations, docstrings, what is for type checkers."""

    def visit(self, node: Any) -> Any:
        node = super().visit(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = node.operand
            if isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
                return inner.operand
            if isinstance(inner, ast.Compare) and type(inner.ops[0]) in _NEGATED:
                return ast.Compare(inner.left, [_NEGATED[type(inner.ops[0])]()], inner.comparators)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return ast.Pass()
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return ast.Assign([node.target], node.value)
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        return node


def bare(code: str) -> str | None:
    """Return what `code` does, as a text to compare; None if it is not valid."""
    try:
        tree = ast.parse(code)
        compile(code, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return None
    return ast.dump(_Bare().visit(tree))


def function_at(tree: ast.AST, line: int) -> str:
    """Return the qualified name of the class or function in which `line` is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= line <= (node.end_lineno or first):
                inner = function_at(node, line)
                return f"{node.name}.{inner}" if inner else node.name
        elif (inner := function_at(node, line)) != "":
            return inner
    return ""


def mutants_of(file: str) -> Iterator[Mutant]:
    original = (ROOT / PACKAGE / file).read_text("utf-8")
    tree = ast.parse(original)
    seen = {bare(original), None}
    keys: Counter[tuple[str, str]] = Counter()
    found: list[tuple[int, str, str]] = []
    for operator in operators():
        for occurrence in range(sys.maxsize):
            code = MutationVisitor.mutate_code(original, operator, occurrence)
            if code is None:
                break
            does = bare(code)
            if does in seen:
                continue
            seen.add(does)
            diff = list(difflib.unified_diff(original.split("\n"), code.split("\n"), n=0))[2:]
            lines = [line for line in diff if line[:2] != "@@" and line not in ("-", "+")]
            gone = next(line[1:] for line in lines if line[0] == "-")
            begin = min(-int(line.split()[1].split(",")[0]) for line in diff if line[:2] == "@@")
            at = original.split("\n").index(gone, max(begin - 1, 0)) + 1
            found.append((at, "\n".join(lines), code))
    for line, text, code in sorted(found):
        title = f"`{file}` `{function_at(tree, line) or 'module'}`"
        mutant = Mutant(title, text, file, code)
        keys[mutant.key] += 1
        if keys[mutant.key] > 1:  # the same change of the same line, but further down
            mutant = replace(mutant, title=f"{title} ({keys[mutant.key]})")
        yield mutant


def explained() -> dict[tuple[str, str], str]:
    """Return the mutants of SURVIVORS.md, with the explanation of each."""
    if not SURVIVORS.exists():
        return {}
    entry = re.compile(r"^### (.*)\n\n((?:```diff\n[^`]*```\n\n)+)((?:(?!#).*\n)*)", re.MULTILINE)
    found: dict[tuple[str, str], str] = {}
    for title, diffs, why in entry.findall(SURVIVORS.read_text("utf-8") + "\n"):
        for diff in re.findall(r"```diff\n([^`]*)```", diffs):
            found[title, " ".join(diff.split())] = why.strip()
    return found


# -- Tests.


def _begin() -> None:
    # A mutant that wants all of the memory does not get it.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Who runs this in the background may have it ignored; there are tests of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_tests(copy: Path, tests: list[str], how: dict[str, Any]) -> str:
    """Run tests in `copy`; return what has noticed the mutant, or nothing."""
    tests = [test for test in tests if (copy / test).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    # No bytecode: two versions of a file that are written in the same second look alike.
    env = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *how["arguments"], *tests],
        cwd=copy,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_begin,
    )
    try:
        output, _ = process.communicate(timeout=how["seconds"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "it hangs"
    if process.returncode == 0:
        return ""
    if process.returncode == -signal.SIGTERM:
        raise SystemExit("somebody has ended the tests")
    if "+ Timeout +" in output:
        return "it hangs"
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failures[0] if failures else output[-300:]


def judge(copy: Path, mutant: Mutant, *, thoroughly: bool) -> tuple[str, str]:
    """Return which pass has killed `mutant` and how, or that it survives."""
    path = copy / PACKAGE / mutant.file
    original = path.read_text("utf-8")
    path.write_text(mutant.code, "utf-8")
    try:
        quick = CONFIG["quick"]
        noticed = run_tests(copy, quick["tests"][mutant.file], quick)
        if noticed:
            return "quick", noticed
        if thoroughly:
            for how in CONFIG["thorough"]:
                noticed = run_tests(copy, how["tests"], how)
                if noticed:
                    return "thorough", noticed
        return "survived", ""
    finally:
        path.write_text(original, "utf-8")


def check_baseline(copy: Path, *, thoroughly: bool) -> None:
    """Make sure that the tests pass without a mistake."""
    quick = CONFIG["quick"]
    runs = [(quick, sorted({test for tests in quick["tests"].values() for test in tests}))]
    runs += [(how, how["tests"]) for how in CONFIG["thorough"] if thoroughly]
    for how, tests in runs:
        noticed = run_tests(copy, tests, how)
        if noticed:
            sys.exit(f"a test fails without any mutation: {noticed}")


def read_log(path: Path | None) -> dict[tuple[str, str], tuple[str, str]]:
    """Return who was killed according to the log of another run, and how."""
    if path is None or not path.exists():
        return {}
    records = map(json.loads, path.read_text("utf-8").splitlines())
    return {
        (record["title"], record["diff"]): (record["fate"], record["noticed"])
        for record in records
        if record["fate"] != "survived"
    }


def judge_all(options: argparse.Namespace, chosen: list[Mutant]) -> dict[Mutant, str]:
    """Return what became of each mutant: the pass that has killed it, or "survived"."""
    reasons, killed = explained(), read_log(options.log)
    fates = {mutant: killed[mutant.key][0] for mutant in chosen if mutant.key in killed}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy = Path(folder, str(number))
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            copies.put(copy)
        print("without a mutation ...", flush=True)
        check_baseline(copy, thoroughly=not options.quick)

        def work(mutant: Mutant) -> None:
            thoroughly = not options.quick and (options.all or mutant.key not in reasons)
            copy = copies.get()
            try:
                fate, noticed = judge(copy, mutant, thoroughly=thoroughly)
            finally:
                copies.put(copy)
            fates[mutant] = fate
            passed = int(time.monotonic() - begin)
            print(f"{len(fates)}/{len(chosen)} {passed} s: {fate} {noticed}", flush=True)
            if options.log:
                title, diff = mutant.key
                record = {"title": title, "diff": diff, "fate": fate, "noticed": noticed}
                with options.log.open("a", encoding="utf-8") as log:
                    print(json.dumps(record), file=log)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, [mutant for mutant in chosen if mutant not in fates]))
    return fates


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests whether the tests notice mistakes.")
    parser.add_argument("--only", default="", help="a pattern: mutants whose title or diff has it")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--list", action="store_true", help="print the mutants, and test nothing")
    parser.add_argument("--log", type=Path, help="a file that is added to; who was killed stays so")
    parser.add_argument("--all", action="store_true", help="all tests for the explained ones too")
    parser.add_argument("--quick", action="store_true", help="the quick tests only")
    options = parser.parse_args()
    everybody = [mutant for file in CONFIG["quick"]["tests"] for mutant in mutants_of(file)]
    chosen = [one for one in everybody if re.search(options.only, f"{one.title}\n{one.diff}")]
    if options.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    reasons = explained()
    fates = judge_all(options, chosen)
    survivors = [mutant for mutant in chosen if fates[mutant] == "survived"]
    new = [mutant for mutant in survivors if mutant.key not in reasons]
    if new:
        print("\nNot explained:\n", *new, sep="\n")
    for mutant in chosen:
        if mutant.key in reasons and mutant not in survivors:
            print(f"Explained, but killed:\n\n{mutant}")
    for key in reasons.keys() - {mutant.key for mutant in everybody}:
        print("Explained, but no mutant any more:", *key)
    count = Counter(fates.values())
    print(
        f"{len(chosen)} mutants: {count['quick']} killed by the quick tests, {count['thorough']} "
        f"by the others; {len(survivors)} survived, {len(survivors) - len(new)} of them explained"
    )
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
