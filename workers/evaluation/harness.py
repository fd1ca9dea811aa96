"""Tasks of lm-evaluation-harness as benchmark items: `python -m workers.evaluation.harness NAME --out FILE`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from app.domain.benchmarks import GENERATION, Scorer, item_id
from app.errors import BadRequest, RetainError

FEWSHOT_SEED: Final = 1234  # the harness's own default
#: Settings of the harness's exact_match under which ours says the same of every answer.
EQUAL_EXACT_MATCH: Final = {
    "metric": "exact_match",
    "ignore_case": True,
    "ignore_punctuation": False,
    "ignore_numbers": False,
    "regexes_to_ignore": None,
}


@dataclass(frozen=True, slots=True)
class ImportedTask:
    """A task, or all tasks of a group, as items of one benchmark."""

    scorer: Scorer
    items: list[dict[str, Any]]
    num_repeated: int  # documents that were there already: an item occurs once
    source: str


def import_task(
    name: str, *, include_path: Path | None = None, scorer: Scorer | None = None
) -> ImportedTask:
    """The documents of a task as items, with the prompts that the harness makes of them.

    Nothing is downloaded: data sets are local files that the task names, or in the local cache.

    Args:
        name: Of a task or group.
        include_path: A directory with task files; None looks among the harness's own.
        scorer: Scores the items in place of the task's metric; None asks for one that equals it.

    Raises:
        BadRequest: There is no such task, it is of a kind that has no items here, or its metric has no equal.
    """
    tasks = load_tasks(name, include_path)
    chosen = {_choose_scorer(task, scorer) for task in tasks}
    if len(chosen) > 1:
        raise BadRequest(f"task: the tasks of '{name}' are scored in different ways.", "task")
    found: dict[str, dict[str, Any]] = {}
    num_documents = 0
    for task in tasks:
        for item in _convert(task):
            num_documents += 1
            found.setdefault(item["id"], item)
    if not found:
        raise BadRequest(f"task: '{name}' has no documents.", "task")
    return ImportedTask(
        scorer=chosen.pop(),
        items=list(found.values()),
        num_repeated=num_documents - len(found),
        source=_describe(name, tasks),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a task's items and prints what they are; 1 when that can't be."""
    parser = argparse.ArgumentParser(prog="python -m workers.evaluation.harness")
    parser.add_argument("name")
    parser.add_argument("--include-path", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scorer", type=Scorer, choices=list(Scorer))
    asked = parser.parse_args(arguments)
    try:
        task = import_task(asked.name, include_path=asked.include_path, scorer=asked.scorer)
    except RetainError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in task.items)
    asked.out.write_text("".join(lines), encoding="utf-8")
    told = {
        "scorer": task.scorer.value,
        "num_items": len(task.items),
        "num_repeated": task.num_repeated,
        "source": task.source,
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


def document_id(task: str, document: Any) -> str:  # noqa: ANN401 - whatever the data set holds
    """The id of a task's document: it follows from its contents."""
    return item_id({"task": task, "document": json.loads(json.dumps(document, default=str))})


def load_tasks(name: str, include_path: Path | None) -> list[Any]:
    """The task of this name, or those of the group; nothing is downloaded.

    Raises:
        BadRequest: There is none, its data is not here, or the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise BadRequest(
            "Tasks are read by lm-evaluation-harness, which is not installed here; install lm-eval.",
            "task",
            "harness_not_available",
        )
    if include_path is not None and not include_path.is_dir():
        raise BadRequest(f"include_path: {include_path} is no directory.", "include_path")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
    )
    if name not in manager.all_tasks:
        raise BadRequest(f"task: the harness knows no task '{name}' there.", "task")
    try:
        tasks = list(manager.load([name])["tasks"].values())
    except (
        OSError,
        ValueError,
        KeyError,
    ) as error:  # what `datasets` raises for data it can't find
        raise BadRequest(
            f"task: '{name}' cannot be loaded without a network: {error}", "task"
        ) from error
    for task in tasks:
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def _choose_scorer(task: Any, wanted: Scorer | None) -> Scorer:  # noqa: ANN401 - an optional library
    kind, name = task.OUTPUT_TYPE, task.config.task
    if kind not in {"multiple_choice", "generate_until"}:
        raise BadRequest(
            f"task: '{name}' is of kind {kind}; multiple_choice and generate_until can be imported.",
            "task",
        )
    own = GENERATION if kind == "generate_until" else frozenset({Scorer.MULTIPLE_CHOICE})
    if wanted is not None:
        if wanted not in own:
            raise BadRequest(f"scorer: '{wanted.value}' does not score a {kind} task.", "scorer")
        return wanted
    metrics = [dict(metric) for metric in task.config.metric_list or ()]
    if kind == "multiple_choice" and any(metric["metric"] == "acc" for metric in metrics):
        return Scorer.MULTIPLE_CHOICE
    if kind == "generate_until" and _has_equal_match(metrics) and not _has_filters(task):
        return Scorer.EXACT_MATCH
    listed = ", ".join(str(metric["metric"]) for metric in metrics)
    raise BadRequest(
        f"scorer: no scorer here equals the metrics of '{name}' ({listed}) as it sets them; name one of"
        f" {', '.join(sorted(own))} to score its items by that instead.",
        "scorer",
    )


def _has_equal_match(metrics: Sequence[dict[str, Any]]) -> bool:
    for metric in metrics:
        settings = {key: metric.get(key, False) for key in EQUAL_EXACT_MATCH}
        settings["regexes_to_ignore"] = metric.get("regexes_to_ignore") or None
        if settings == EQUAL_EXACT_MATCH:
            return True
    return False


def _has_filters(task: Any) -> bool:  # noqa: ANN401 - an optional library
    """Whether answers are edited before they are compared; taking the first of one is no edit."""
    steps = [step["function"] for each in task.config.filter_list or () for step in each["filter"]]
    return any(step not in {"take_first", "remove_whitespace"} for step in steps)


def _convert(task: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - an optional library
    name = task.config.task
    task.build_all_requests(limit=None, rank=0, world_size=1)
    seen: set[int] = set()
    for instance in task.instances:
        if instance.doc_id in seen:  # of multiple choice there is one for every choice
            continue
        seen.add(instance.doc_id)
        document = json.loads(json.dumps(instance.doc, default=str))
        item = {
            "id": document_id(name, instance.doc),
            "question": instance.args[0],
            "subject": str(document.get("subject") or name),
        }
        target = task.doc_to_target(instance.doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            yield item | _as_choices(task, instance.doc, target)
        else:
            accepted = [str(each).strip() for each in target] if isinstance(target, list) else None
            first = str(target).strip() if accepted is None else accepted[0]
            yield item | {"answer": first} | ({} if accepted is None else {"answers": accepted})


def _as_choices(task: Any, document: Any, target: Any) -> dict[str, Any]:  # noqa: ANN401
    choices = [str(choice).strip() for choice in task.doc_to_choice(document)]
    if isinstance(target, str):
        target = choices.index(target.strip()) if target.strip() in choices else None
    if not isinstance(target, int) or not isinstance(task.doc_to_text(document), str):
        raise BadRequest(
            f"task: '{task.config.task}' has several right choices, or a context for each choice; such"
            " documents are no multiple-choice items here.",
            "task",
        )
    return {"choices": choices, "answer": target}


def _describe(name: str, tasks: Sequence[Any]) -> str:
    """Where the items come from, in one line that is kept with the benchmark."""
    shots = sorted({task.config.num_fewshot or 0 for task in tasks})
    versions = sorted({str(task.VERSION) for task in tasks})
    metrics = sorted({str(m["metric"]) for task in tasks for m in task.config.metric_list or ()})
    harness = import_module("importlib.metadata").version("lm_eval")
    return (
        f"lm_eval {harness}: {name}@{','.join(versions)}, {','.join(map(str, shots))}-shot,"
        f" metrics {','.join(metrics)}"
    )[:1024]


if __name__ == "__main__":
    sys.exit(main())
