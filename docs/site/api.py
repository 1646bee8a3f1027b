"""Writes the reference of the public Python API from its source: signatures with types, docstrings, and comments of fields.

It reads the files and imports none of them, so that it needs neither torch nor Ray.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from docs.site.commands import prose

PACKAGE = Path(__file__).parents[2] / "platform" / "heliostat"
WIDTH = 100  # of a signature in one line
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = ("load_job", "check", "prepare", "train", "generate", "datasets")


@dataclass(frozen=True)
class Module:
    """Holds a source file, by its path below the package."""

    path: str

    @cached_property
    def text(self) -> str:
        return (PACKAGE / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def functions(self) -> dict[str, Function]:
        """Returns the functions of the file by name; of overloaded ones the implementation, which comes last."""
        return {node.name: node for node in self.tree.body if isinstance(node, Function)}

    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def comment(self, node: ast.stmt) -> str:
        """Returns the comment behind a statement, on its last line."""
        line = self.text.splitlines()[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset or 0 :].decode()
        return line.partition("#")[2].strip()

    def aliases(self) -> dict[str, str]:
        """Returns the names that stand for types: `Place = str | os.PathLike[str]`."""
        names: dict[str, str] = {}
        for node in self.tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.istitle() and isinstance(node.value, ast.BinOp | ast.Subscript):
                names[target.id] = ast.unparse(node.value)
        return names


def signature(function: Function, name: str, width: int = WIDTH) -> str:
    """Writes a function's signature as code, over several lines if it is longer than `width`."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and name[0].islower() else ""
    parts = list(parameters(function.args))
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= width else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def parameters(arguments: ast.arguments) -> Iterator[str]:
    """Writes each parameter with its type and default, except `self` and `cls`."""
    named = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults))
    for argument, default in zip(named, [*missing, *arguments.defaults], strict=True):
        if argument.arg not in ("self", "cls"):
            yield _parameter(argument, default)
    if arguments.vararg or arguments.kwonlyargs:
        yield f"*{_parameter(arguments.vararg, None)}" if arguments.vararg else "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def code(text: str) -> list[str]:
    return ["```py", text, "```", ""]


def function(module: Module, name: str, prefix: str = "heliostat.") -> list[str]:
    """Writes a function: heading, signature, docstring."""
    node = module.functions()[name]
    return [f"### `{prefix}{name}` {{ #{name} }}", "", *code(signature(node, name)), _text(node), ""]


def described(module: Module, name: str, prefix: str = "heliostat.") -> list[str]:
    """Writes a class: heading, bases, docstring, its fields and its public methods."""
    node = module.classes()[name]
    bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("ABC", "TypedDict", "NamedTuple", "Protocol")]
    derived = f"({', '.join(bases)})" if bases else ""
    lines = [f"### `{prefix}{name}` {{ #{name.lower()} }}", "", *code(f"class {name}{derived}"), _text(node), ""]
    fields = [m for m in node.body if isinstance(m, ast.AnnAssign) and not ast.unparse(m.target).startswith("_")]
    if fields:
        lines += code("\n".join(_field(module, field) for field in fields))
    for member in node.body:
        if isinstance(member, Function) and _public(member):
            lines += _entry(*_method(member, name))
    return lines


def _field(module: Module, field: ast.AnnAssign) -> str:
    value = f" = {ast.unparse(field.value)}" if field.value else ""
    comment = module.comment(field)
    return f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{value}" + (f"  # {comment}" if comment else "")


def _public(member: Function) -> bool:
    decorators = {ast.unparse(d) for d in member.decorator_list}
    return "overload" not in decorators and (not member.name.startswith("_") or member.name == "__init__")


def _method(member: Function, owner: str) -> tuple[str, str]:
    decorators = {ast.unparse(d) for d in member.decorator_list}
    text = _text(member)
    if "property" in decorators:
        return f"{member.name}: {ast.unparse(member.returns) if member.returns else 'object'}", text
    shown = signature(member, owner if member.name == "__init__" else member.name, 1000)
    return shown, f"**Required.** {text}" if "abstractmethod" in decorators else text


def _entry(spelled: str, text: str) -> list[str]:
    return [f"`{spelled}`", f":   {text or '-'}".replace("\n\n", "\n\n    "), ""]


def _text(node: ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef) -> str:
    """Converts a docstring to Markdown. What is in braces or brackets is code."""
    return prose(re.sub(r"(?<![`\w])(\{[^{}\n]*\}|\w+\[[^\[\]\n]*\])(?!`)", r"`\1`", ast.get_docstring(node) or ""))


def aliases() -> str:
    """Writes what the short names of types mean."""
    names = Module("api/functions.py").aliases() | Module("recipes/protocol.py").aliases() | Module("data/content.py").aliases()
    rows = [f"| `{name}` | `{text}` |".replace(" | ", " \\| ").replace("` \\| `", "` | `") for name, text in names.items()]
    return "\n".join(["| type | meaning |", "|---|---|", *rows])


def public() -> str:
    """Writes the functions and classes that `import heliostat` offers."""
    functions, lines = Module("api/functions.py"), ["## Functions", ""]
    for name in FUNCTIONS:
        lines += function(functions, name)
    lines += ["## Runs and jobs", "", *described(Module("api/run_handle.py"), "Run")]
    lines += described(Module("validation/check.py"), "Checked")
    lines += described(Module("recipes/protocol.py"), "Generated")
    lines += ["## Exact data", "", *described(Module("api/exact_stream.py"), "ExactStream")]
    feed = Module("api/exact_feed.py")
    for name in ("Feed", "Batch", "Sealed"):
        lines += described(feed, name, "")
    return "\n".join(lines)


def recipes() -> str:
    """Writes the protocol of recipes, and the helpers that make batches."""
    protocol, helpers = Module("recipes/protocol.py"), Module("recipes/batches.py")
    lines: list[str] = []
    for name in protocol.classes():
        if name != "Generated":
            lines += described(protocol, name, "")
    for name in ("pad", "segments"):
        lines += function(helpers, name, "heliostat.recipes.batches.")
    return "\n".join(lines)


def errors() -> str:
    """Writes the error classes with what they derive from and what they mean."""
    lines = ["| class of `heliostat.errors` | derives from | meaning |", "|---|---|---|"]
    for name, node in Module("errors.py").classes().items():
        bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
        lines.append(f"| `{name}` | {bases} | {_text(node).replace(chr(10), ' ')} |")
    return "\n".join(lines)
