"""What a folder's generation_config.json says: which tokens end an answer, and what is not used of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.values.json_files import read_object

FILE = "generation_config.json"
# settings that change greedy answers too, by values that change nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
    "watermarking_config": (),
}


def generation_settings(folder: Path) -> dict[str, Any]:
    """All that the file says; nothing where there is none. Raises ValueError for a damaged one.

    transformers takes a damaged file for none, with which answers may not end where they should.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    return read_object(path)


def end_tokens(settings: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer, none where that is not said. Raises ValueError for what is no token."""
    said = settings.get("eos_token_id")
    tokens = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError(
            f"{FILE} has eos_token_id {said!r}: it must be the number of a token, or a list of them"
        )
    return [token for token in tokens if token >= 0]  # -1 stands for none


def unused_settings(settings: Mapping[str, Any]) -> list[str]:
    """A note on what would change even greedy answers, if it were used."""
    unused = [
        f"{name} {settings[name]}"
        for name, neutral in NEUTRAL.items()
        if settings.get(name) not in (None, [], {}, *neutral)
    ]
    if not unused:
        return []
    told = ", ".join(unused)
    return [f"{FILE} says {told}, and only its stop tokens are used: flags say how answers are chosen"]
