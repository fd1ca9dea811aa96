"""What the chosen `method` asks of a job's files, stages and strategies; refused at submit with what to do instead."""

from collections.abc import Mapping
from typing import Final

from app.domain.rows import RowFormat
from app.domain.spec import CreateJob
from app.errors import BadRequest

GENERAL_DATA: Final = "retention.general_data"
WRONG_FORMAT: Final = "wrong_row_format"


def is_preference(request: CreateJob) -> bool:
    """Whether the job learns from pairs of answers."""
    return request.method is not None and request.method.type == "dpo"


def check_stages(request: CreateJob) -> None:
    """Refuses stages of a job that compares answers.

    Raises:
        BadRequest: `param` is `preset` or `stages`.
    """
    param = "preset" if request.preset is not None else "stages" if request.stages else None
    if param is not None and is_preference(request):
        raise BadRequest(
            f"{param}: a job of method.type 'dpo' has one stage; run a 'supervised' job with {param} first,"
            " and start the 'dpo' job from the model that it made.",
            param,
        )


def check_formats(request: CreateJob, formats: Mapping[str, str]) -> None:
    """Refuses a file whose rows are another method's.

    Args:
        request: The job request.
        formats: The rows' format of each checked file, by the request field that named it; the general data
            is `retention.general_data` whoever named it.

    Raises:
        BadRequest: With code `wrong_row_format`.
    """
    for param, found in formats.items():
        compares = found == RowFormat.PREFERENCE
        if param == GENERAL_DATA:
            if compares:
                _refuse(
                    param,
                    "its rows compare answers, and general data are rows that show them; give rows of"
                    " `messages`, `prompt` with `completion`, or `text`.",
                )
        elif compares and not is_preference(request):
            _refuse(
                param,
                "its rows compare answers (`preferred_output`), and method.type is 'supervised'; set"
                " method.type to 'dpo', or give rows of `messages`, `prompt` with `completion`, or `text`.",
            )
        elif is_preference(request) and not compares:
            _refuse(
                param,
                f"its rows are of format '{found}', and method.type is 'dpo'; give rows of `input` with"
                " `preferred_output` and `non_preferred_output`, or set method.type to 'supervised'.",
            )


def _refuse(param: str, what: str) -> None:
    raise BadRequest(f"{param}: {what}", param, WRONG_FORMAT)
