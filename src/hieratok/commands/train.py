"""`hieratok train`: a recipe or a YAML file, with every setting as a flag."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from shlex import quote

from hieratok.settings import (
    HELP,
    Command,
    Option,
    field_texts,
    help_text,
    load_run,
    run_options,
)
from hieratok.studies.recipes import Run
from hieratok.training.config import GeneratorRun, TokenizerRun

SUMMARY = "Train a recipe or a YAML file; the same command again resumes."
EXAMPLES = {
    "tokenizer": "Example: hieratok train tiny-multi --data photos/ --train.steps 2000 --model.scales '[1,4,8]'",
    "generator": "Example: hieratok train dit-tiny --tokenizer runs/tiny-multi --data latents/tiny-multi",
}
ANY_RECIPE = (
    "`hieratok recipes` lists the recipes. `hieratok train RECIPE --help` shows a recipe's values; a generator's"
    " settings are those of `hieratok train dit-tiny --help`."
)
SOURCE = Option("source", str, "A recipe's name, or a file of settings.", is_positional=True, value="RECIPE|FILE.yaml")
FIRST = ["data.path", "start_from", "model.encoder", "tokenizer", "out", "allow_changes"]
"""What a run needs besides its recipe."""
COMMON = ["train.steps", "train.batch_size", "train.learning_rate", "model.image_size", "model.scales"]
"""The settings that are changed most often."""
HIDDEN = ["kind"]
"""Set by the recipe or file, so not listed."""


def main(arguments: list[str]) -> None:
    """The command.

    Raises:
        ValueError, FileNotFoundError, TrainingError, Stopped: as `train_tokenizer` and `train_generator`.
    """
    source = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if HELP & set(arguments):
        print(train_help(source))
        return
    if source is None:
        raise ValueError("say what to train: hieratok train RECIPE|FILE.yaml (`hieratok recipes` lists the recipes)")
    run, out, allow_changes = load_run(source, arguments[1:])
    if isinstance(run, GeneratorRun):
        from hieratok.training.generator import train_generator

        train_generator(run, out, allow_changes)
        tokenizer = quote(run.tokenizer) if run.tokenizer else "RUN"
        following = f"hieratok sample {quote(str(out))} --tokenizer {tokenizer} --out {quote(str(out / 'samples'))}"
    else:
        from hieratok.training.tokenizer import train_tokenizer

        train_tokenizer(run, out, allow_changes)
        following = f"hieratok reconstruct {quote(str(out))} PHOTO.jpg --out {quote(str(out / 'reconstructions'))}"
    from hieratok.core.distributed import is_first

    if is_first():
        print(f"{run.kind}: {out / run.kind}\nlog:       {out / 'log.jsonl'} (tensorboard --logdir {out})")
        print(f"next:      {following}")


def train_help(source: str | None) -> str:
    """The help: of a recipe or file with its values, or of tokenizers in general, with none.

    Raises:
        ValueError, FileNotFoundError: no such recipe or file.
    """
    run: Run = load_run(source).run if source else TokenizerRun()
    options = [option for option in run_options(run, with_texts=True) if option.name not in HIDDEN]
    if source is None:
        options = [option._replace(default=None) for option in options]
    by_name = {option.name: option for option in options}
    texts = field_texts(type(run))
    groups: list[tuple[str, Sequence[Option]]] = [
        ("what to train", [SOURCE, *(by_name.pop(name) for name in FIRST if name in by_name)]),
        ("common settings", [by_name.pop(name) for name in COMMON if name in by_name]),
    ]
    rest = list(by_name.values())
    groups.append(("the run", [option for option in rest if "." not in option.name]))
    for field in fields(run):
        if is_dataclass(getattr(run, field.name)):
            title = f"{field.name}: {texts[field.name].rstrip('.')}"
            groups.append((title, [option for option in rest if option.name.startswith(f"{field.name}.")]))
    usage = f"hieratok train {source or SOURCE.value} [--data PATH] [--out DIR] [OPTIONS]"
    about = "\n".join([SUMMARY, EXAMPLES[run.kind]] + [ANY_RECIPE] * (source is None))
    return help_text(usage, about, groups)


COMMAND = Command(SUMMARY, main)
