"""What MkDocs calls while it builds the site: pages made of the program itself, code by name, equations as MathML.

    {{ code PATH NAME }}      the source of a function or class; NAME may be nested, such as Outer.inner
    {{ doc PATH [NAME] }}     a docstring as it stands
    {{ api MODULE }}          the reference of a module by mkdocstrings, where the module is there

The pages of commands, settings, HTTP and modules are written anew in each build, so they cannot differ from the program.
"""

import ast
import html
import os
import pathlib
import re
import subprocess
import sys
import textwrap

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the site describes this tree, not another one that is installed
ROOMS = {  # in the order in which one imports from the other
    "config": "Every setting of a run, with its bounds.",
    "kernels": "Operators: arrays in, arrays out.",
    "files": "Files that are whole or not there.",
    "comm": "Messages between ranks: start, averaging, topologies, recovery.",
    "model": "The language model over flat vectors.",
    "remote": "Stores of files that are named by what is in them.",
    "data": "Text to tokens, shards and lanes.",
    "runs": "The folder of a run, its state and its checkpoints.",
    "inference": "The use of a trained model: loss, sampling, search.",
    "launching": "How a job is started and watched.",
    "training": "The training loop.",
    "engines": "What is asked of a model that is served, and what computes it.",
    "peers": "What the ranks of a server say to each other.",
    "serving": "Answers over HTTP.",
    "tools": "Commands that look at what is there, or for a learning rate.",
}
PLACE = re.compile(r"^\{\{ (code|doc|api) (\S+)(?: (\S+))? \}\}$", re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">\s*(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])\s*</\1>', re.DOTALL)


def on_files(files, config):
    """Add the pages that are made of the program."""
    pages = {"commands": _commands(), "settings": _settings(), "http": _http(), "modules": _modules()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for room, what in ROOMS.items():
        files.append(File.generated(config, f"reference/modules/{room}.md", content=_room(room, what)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in code, docstrings and references by name."""
    try:
        return PLACE.sub(_insert, markdown)
    except (LookupError, OSError) as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None


def on_page_content(content, page, config, files):
    """Equations become MathML, which browsers draw by themselves: the site needs no script and no other site for them."""
    display = {"span": "inline", "div": "block"}
    return MATH.sub(lambda found: convert(html.unescape(found[2]), display=display[found[1]]), content)


def _insert(found):
    what, where, name = found.groups()
    if what == "api":
        path = ROOT / pathlib.Path(*where.split("."))
        there = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
        return f"::: {where}" if there else f"`{where}` is not part of this tree."
    text = (ROOT / where).read_text(encoding="utf-8")
    node = _find(ast.parse(text), name, where)
    if what == "doc":
        return f"```text\n{ast.get_docstring(node)}\n```"
    lines = text.splitlines()[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
    code = textwrap.dedent("\n".join(lines))
    return f'```python title="{where}"\n{code}\n```'


def _find(node, name, where):
    for part in name.split(".") if name else []:
        inside = [child for child in ast.walk(node) if getattr(child, "name", None) == part and child is not node]
        if not inside:
            raise LookupError(f"{where} has no {name}")
        node = inside[0]
    return node


def _commands():
    """--help of each command."""
    from dllm.__main__ import COMMANDS

    env = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    lines = ["# Commands", "", "These texts are what each command prints with `--help`.",
             "`dllm COMMAND` and `python -m dllm.COMMAND` are the same.", "",
             "Every command ends with exit code 0 if it is done. Code 2 means that the input was bad.",
             "A closed pipe or a full disk behind standard output ends no command. Letters that it lacks are escaped.",
             "Those whose product is what they print, such as `generate`, end with code 2 where it finds no room.",
             "Code 75 means that a run stopped early and that `--resume` goes on with it."]  # fmt: skip
    for command, what in COMMANDS.items():
        asked = subprocess.run(
            [sys.executable, "-m", "dllm", command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )  # fmt: skip
        if asked.returncode:
            raise PluginError(f"dllm {command} --help failed: {asked.stderr}")
        lines += ["", f"## dllm {command}", "", f"{what[0].upper()}{what[1:]}.", "", "```text", asked.stdout.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _settings():
    """Every setting with its bounds and effect, and what each preset changes."""
    from dllm import config
    from dllm.comm import methods

    lines = ["# Settings", "", "`--set section.key=value` changes a setting. `--config file.toml` changes several.",
             "A preset sets some of them first. The `config.toml` of a run holds them all.",
             "The values below are those of the preset `default`.", ""]  # fmt: skip
    rows = config.settings_table(config.resolve("default"), methods.choices())
    lines += [config.settings_markdown(rows), ""]
    plain = config.flat(config.Config())
    lines += ["## Presets", "", "A preset changes these settings and leaves the others at their defaults.", ""]
    for preset in config.preset_names():
        changed = {name: value for name, value in config.flat(config.resolve(preset)).items() if value != plain[name]}
        lines += [f"### {preset}", "", "```text", *(f"{name} = {value!r}" for name, value in changed.items()), "```", ""]
    return "\n".join(lines)


def _http():
    """The routes and their bodies, of the description that the server gives out."""
    from dllm.engines.limits import Limits
    from dllm.serving import openapi

    schemas, paths = {}, {}
    for kind in openapi.POSTS:
        description = openapi.describe([openapi.Described("MODEL", 2048, kind)], Limits(), True)
        schemas |= description["components"]["schemas"]
        for path, methods in description["paths"].items():
            for method, entry in methods.items():
                paths.setdefault((path, method), {})[kind] = entry
    lines = ["# HTTP", "", "`dllm serve` answers on these paths. `/openapi.json` describes those of the model served.",
             "The numbers below are those of a model with 2,048 tokens and of the default limits.",
             "A server with a token expects the header `Authorization: Bearer TOKEN` on every path but `/`, `/health` and",
             "`/health/ready`.",
             ""]  # fmt: skip
    for (path, method), entries in paths.items():
        entry = next(iter(entries.values()))
        lines += [f"## {method.upper()} {path}", ""]
        if "requestBody" in entry:
            for kind, one in entries.items():
                lines += [
                    f"{one['summary']}, of a model of kind {kind}. Request: {_reference(one['requestBody']['content'])}",
                    "",
                ]
        else:
            lines += [f"{entry['summary']}.", ""]
        lines += ["| status | meaning | body |", "| --- | --- | --- |"]
        for status, answer in entry["responses"].items():
            meaning = "The answer" if status == "200" else answer["description"]
            lines.append(f"| {status} | {meaning} | {_reference(answer.get('content', {}))} |")
        lines.append("")
    lines += ["# Bodies", ""]
    for name, schema in schemas.items():
        lines += [f"## {name}", ""]
        for alternative in schema.get("oneOf", [schema]):
            required = alternative.get("required", [])
            lines += ["| field | type | required |", "| --- | --- | --- |"]
            for field, kind in alternative.get("properties", {}).items():
                lines.append(f"| `{field}` | {_kind(kind)} | {'yes' if field in required else 'no'} |")
            lines.append("")
    return "\n".join(lines).replace("# Bodies", "## Bodies").replace("\n## Bodies", "\n---\n\n## Bodies")


def _reference(content):
    kinds = []
    for media, entry in content.items():
        kinds.append(f"{_kind(entry['schema'])} (`{media}`)")
    return ", or ".join(kinds)


def _kind(schema):
    """A JSON schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_kind(one) for one in schema[several]))
    if "const" in schema:
        return f"`{schema['const']!r}`"
    if "enum" in schema:
        return ", ".join(f"`{value!r}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    bounds = [f"{word} {schema[name]}" for name, word in (("minimum", "from"), ("maximum", "to")) if name in schema]
    return " ".join([kind, *bounds])


def _modules():
    lines = ["# Modules", "", "The package has one direction: a room imports only from rooms above it in this table.", "",
             "| room | what it holds |", "| --- | --- |"]  # fmt: skip
    lines += [f"| [`dllm.{room}`](modules/{room}.md) | {what} |" for room, what in ROOMS.items()]
    return "\n".join(lines) + "\n"


def _room(room, what):
    folder = ROOT / "dllm" / room
    lines = [f"# dllm.{room}", "", what, ""]
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            lines += [f"::: {module}", ""]
        elif path.parent != folder or ast.parse(path.read_text(encoding="utf-8")).body[1:]:
            lines += [f"::: {module.removesuffix('.__init__')}", "    options:", "      members: []", ""]
    return "\n".join(lines)
