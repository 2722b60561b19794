"""What the commands share: parser, common options, printing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace

from dgnet._guard import report_end
from dgnet.cli.network_options import as_typed, find_option, find_typed_code
from dgnet.cli.timm_names import suggest
from dgnet.code import CODE_OPTIONS, is_code_path, list_packages
from dgnet.compat.argparse import option_strings
from dgnet.devices import find_device as find_device
from dgnet.documents import parse_yaml, read_yaml
from dgnet.errors import UsageError, did_you_mean
from dgnet.files import to_json, without_nan
from dgnet.options import MOST_WORKERS, check_bounds, flag
from dgnet.paths import is_file
from dgnet.typed import Location, describe, hints_of, read_value, read_word

if TYPE_CHECKING:
    from dgnet.training import RunConfig, RunResult

C = TypeVar("C", bound="RunConfig")


class Parser(ArgumentParser):
    """jsonargparse's parser, with `dgnet.typed` as the reader of all values, and errors of one line.

    Values from `--config` files are defaults: what is typed decides over them, wherever it stands. Of an option that holds a
    dict, one entry can be given, as in `--model-kwargs.router_bias 0`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe: dict[str, Any] = {}  # what a recipe may hold: destination -> type
        self.hints: dict[str, Any] = {}  # option as typed -> type
        self.suggest = did_you_mean  # from an unknown name and the known ones to a hint
        self.moved: set[str] = set()  # options as typed, whose value is the first argument
        self.typed_code: list[str] = []  # packages and classes that were typed, which is how a user trusts code
        self.bounds: dict[str, tuple[float, ...]] = {}  # destination -> the lowest number, or the lowest and the highest

    def add_argument(self, *names: str, type: Any = None, **settings: Any) -> Any:
        """As argparse's. `type`: an annotation that `dgnet.typed` reads."""
        if type is None:
            return super().add_argument(*names, **settings)
        what = names[0] if names[0].startswith("-") else settings.get("metavar", names[0])
        if names[0].startswith("-"):
            self.hints[names[0]] = type
        return super().add_argument(*names, type=_Reader(type, what, settings.get("default")), **settings)

    def parse(self, words: Sequence[str], defaults: bool = True) -> Namespace:
        """The options in the `words` of the command line. `defaults`: also the options that are not given.

        Raises UsageError for a mistake in the words or in a recipe.
        """
        words, recipes, entries = self._take_apart(self._move(words))
        if self.recipe:
            typed = self.parse_args(words, defaults=False)  # without what recipes hold
            self.typed_code = find_typed_code({**typed, **{names[-1]: value for _, names, value in entries}})
        for path in recipes:
            self.set_defaults(self._read_recipe(path))
        args = self.parse_args(words, defaults=defaults)
        for option, names, value in entries:
            args[option] = _with_entry(args.get(option) or {}, names, value, flag(option))
        check_bounds(args, self.bounds)
        return args

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UsageError instead of printing the usage and exiting."""
        cause = sys.exception()
        while cause is not None and not isinstance(cause, UsageError):
            cause = cause.__cause__ or cause.__context__
        raise UsageError(str(cause) if cause is not None else message) from None

    def hint(self, name: str, options: Iterable[str]) -> str:
        """A hint for an unknown option, as it is typed or in a recipe. `options`: the known ones."""
        known = find_option(name.lstrip("-").replace("-", "_"), option_strings(self), "model_kwargs" in self.recipe)
        return f"; here it is {known}" if known else self.suggest(name, options)

    def spell(self, message: str) -> str:
        """A message of the library with options as this command has them."""
        return as_typed(message, option_strings(self), "model_kwargs" in self.recipe)

    def _move(self, words: Sequence[str]) -> list[str]:
        """The words with the value of an option of `moved` as the first argument."""
        rest: list[str] = []
        left = list(words)
        while left:
            name, has_value, value = left[0].partition("=")
            if left[0] == "--":
                break
            if name in self.moved and (has_value or len(left) > 1):
                value = value if has_value else left[1]
                return [read_word(Location, value, name), *rest, *left[1 if has_value else 2 :]]
            rest.append(left.pop(0))
        return [*rest, *left]

    def _take_apart(self, words: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, list[str], Any]]]:
        """The words without recipes and entries; the recipes' paths; and for each entry (destination, names, value)."""
        rest: list[str] = []
        recipes: list[str] = []
        entries: list[tuple[str, list[str], Any]] = []
        left = list(words)
        while left:
            word = left.pop(0)
            name, has_value, value = word.partition("=")
            option, *names = name.removeprefix("--").split(".")
            destination = option.replace("-", "_")
            is_entry = name.startswith("--") and bool(names) and destination in self.recipe
            is_recipe = name == "--config" and bool(self.recipe)
            if word == "--" or not (is_entry or is_recipe) or not (has_value or left):
                rest.append(word)
                if word == "--":
                    return [*rest, *left], recipes, entries
                continue
            value = value if has_value else left.pop(0)
            if is_recipe:
                recipes.append(value)
            elif self.recipe[destination] != dict[str, Any] or not all(names):
                raise UsageError(f"unknown option {name}; {flag(destination)} takes {describe(self.recipe[destination])}")
            else:
                entries.append((destination, names, parse_yaml(value, name) if value.strip() else value))
        return rest, recipes, entries

    def _read_recipe(self, path: str) -> dict[str, Any]:
        values = read_yaml(read_value(Location, path, "--config"), "--config")
        if values is not None and not isinstance(values, dict):
            raise UsageError(f"--config {path} must hold options, as in `lr: 0.1`")
        for name in values or {}:
            if name not in self.recipe:
                own = next((known for known in self.recipe if flag(known) == f"--{name}"), None)  # --import
                hint = f"; in a recipe it is {own}" if own else self.hint(str(name), self.recipe)
                raise UsageError(f"--config {path}: unknown option {name!r}{hint}")
        return {
            name: read_value(self.recipe[name], value, f"--config {path}: {flag(name)}")
            for name, value in (values or {}).items()
        }


class _Reader:
    """From a word of the command line, or a value that was read before, to a value of the type `hint`."""

    def __init__(self, hint: Any, what: str, default: Any) -> None:
        self.hint, self.what, self.default = hint, what, default

    def __call__(self, value: Any) -> Any:
        if value is self.default:
            return value
        read = read_word if isinstance(value, str) else read_value
        return read(self.hint, value, self.what)

    def __str__(self) -> str:  # help texts show it
        return describe(self.hint)


def _with_entry(values: Mapping[str, Any], names: Sequence[str], value: Any, option: str) -> dict[str, Any]:
    """`values` with one more entry, under `names` from the outside to the inside."""
    name, *inner = names
    if inner:
        if not isinstance(values.get(name, {}), Mapping):
            raise UsageError(f"{option}.{name} is {values[name]!r}, which has no entry {'.'.join(inner)}")
        value = _with_entry(values.get(name, {}), inner, value, f"{option}.{name}")
    return {**values, name: value}


@dataclass(frozen=True)
class Command:
    """A command of `dgnet`."""

    build: Callable[[], Parser]  # builds the parser; imports what the options need
    run: Callable[[Namespace], int | None]  # does the work; returns the exit status if it may differ from 0
    is_resumable: bool = False  # if True, `run` gets only the options typed by the user, without defaults, for --resume
    sets_memory: bool = False  # if True, the command itself decides whether to call `keep_freed_memory`
    has_processes: bool = False  # if True, launchers such as torchrun may start it: their variables are checked


@dataclass(frozen=True)
class Group:
    """Commands under a common first word, such as `dgnet detect train`."""

    description: str
    commands: Mapping[str, Command | Group]


def add_fields(parser: Parser, config: type[Any]) -> None:
    """Add an option for each field of the dataclass `config` that was made with `dgnet.options.option`."""
    for f in fields(config):
        if "help" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            hint = parser.recipe[f.name] = hints_of(config)[f.name]
            parser.add_argument(flag(f.name), dest=f.name, type=hint, default=default, help=f.metadata["help"])


def build_train_parser(config: type[RunConfig], description: str) -> Parser:
    """The parser of a training command with the options of the dataclass `config`."""
    parser = Parser(description=description)
    parser.suggest = suggest
    parser.add_argument(
        "--config", type=Location | None, help="recipe: a YAML file of these options; typed options decide over it"
    )
    parser.add_argument("--resume", type=Location | None, metavar="RUN", help="continue the run in this folder")
    add_fields(parser, config)
    return parser


def run_training(args: Namespace, kind: type[C], train: Callable[[C, Path | None], RunResult]) -> tuple[RunResult | None, C]:
    """Train, or continue with `--resume`. Returns the result (None except in the main process) and the configuration.

    If a signal ended the run, exits with status 128 plus the signal's number.
    """
    from dgnet.training import Interrupted, is_main_process, read_run

    resume = Path(args.resume) if args.get("resume") is not None else None
    values = {f.name: args[f.name] for f in fields(kind) if f.name in args}
    result = None
    if resume is not None:
        config, result = read_run(resume, values, kind)
    else:
        config = kind(**values)
    try:
        if result is None:
            result = train(config, resume)
        else:
            print(f"{resume} is finished; there is nothing to continue", file=sys.stderr)
    except Interrupted as error:
        if is_main_process():
            is_kept = is_file(error.folder / "config.yaml")
            trust = trust_words(config, "--import")
            how = f"; continue with: dgnet {kind.command} --resume {error.folder}{trust}" if is_kept else ""
            report_end(f"dgnet: {error}{how}")
        raise SystemExit(128 + error.signum) from None
    return (result if is_main_process() else None), config


def trust_words(config: RunConfig, option: str) -> str:
    """What to type with a command for a run whose code is the user's own, after a space; else "".

    `option`: --import to continue the run, --trust-code to use its checkpoint.
    """
    from dgnet.models import needed_packages

    imports = needed_packages(config.model, config.imports)
    if option == flag("imports"):
        imports = list_packages(config.imports, option)
    options = {**config.model_kwargs, "weighting": config.weighting}  # a checkpoint holds the edges of a topology
    paths = [options[name] for name in CODE_OPTIONS if is_code_path(options.get(name))]
    packages = [*imports, *(path.partition(".")[0] for path in paths)]
    return f" {option} {','.join(dict.fromkeys(packages))}" if packages else ""


def add_checkpoint(parser: Parser, nargs: str | None = None) -> None:
    """Add the argument for the checkpoint."""
    parser.add_argument(
        "checkpoint",
        type=Location,
        nargs=nargs,
        help="run folder, .ckpt file, model.safetensors, or a published network: local-dir:FOLDER, hf-hub:USER/NAME, or a name"
        " that dgnet models --pretrained lists",
    )
    add_trust(parser)


def add_trust(parser: Parser) -> None:
    """Add `--trust-code`."""
    parser.add_argument(
        "--trust-code",
        type=str | None,
        default=None,
        metavar="PACKAGES",
        help="packages, separated by commas, that may be imported if the checkpoint names them, or a class of theirs",
    )


def add_json(parser: Parser) -> None:
    """Add `--json`; `print_json` prints the document."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_device(parser: Parser) -> None:
    """Add `--device`; `find_device` reads it."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")


def add_loader_options(parser: Parser, batch_size: int = 128) -> None:
    """Add the options for loading images in batches."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0 loads in the main process")
    parser.bounds |= {"batch_size": (1,), "workers": (0, MOST_WORKERS)}
    add_max_pixels(parser)
    add_device(parser)


def add_max_pixels(parser: Parser) -> None:
    """Add `--max-pixels`; `apply_max_pixels` sets the limit."""
    parser.add_argument(
        "--max-pixels",
        type=float | None,
        default=None,
        help="largest image, in million pixels; by default that of the run, or 178.9, Pillow's limit",
    )


def apply_max_pixels(args: Namespace) -> None:
    """Allow images of up to `--max-pixels`. Raises UsageError for a number that is not above 0."""
    from dgnet.data import set_max_pixels

    set_max_pixels(args.max_pixels)


def print_json(document: Any) -> None:
    """Print one JSON document, with one line per item if it is a list; see `without_nan`. It is valid in any encoding."""
    plain = without_nan(document)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if isinstance(plain, list):
        print("[\n" + ",\n".join(f"  {to_json(item, encoding)}" for item in plain) + "\n]")
    else:
        print(to_json(plain, encoding))


def write_then_print(write: Callable[[], object], show: Callable[[], None]) -> None:
    """Write the files of a command, then print what it found: a failing print loses no file, a failing file no figure.

    Raises UsageError from `write`, after `show`.
    """
    try:
        write()
    except UsageError:
        show()
        raise
    show()


def describe_wirings(figures: Mapping[str, Any], at_least: str = "") -> str:
    """One line with figures from `WiringStatistics.summary`."""
    return (
        f"closed edges {100 * figures['closed_edges']:.2f} %, distinct wirings {at_least}{figures['distinct_wirings']:,},"
        f" spread of an edge's weight {figures['weight_std']:.4f}"
    )


def warn_if_nothing_skips(network: Any, path: Path) -> None:
    """Print one line on stderr if the sparse mode has nothing to skip."""
    from dgnet.inference import can_skip

    if not can_skip(network):
        print(f"{path}: no edge or block can close, so nothing will be skipped", file=sys.stderr)
