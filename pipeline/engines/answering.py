"""What an output row says: of a prefill, of an answer, and of what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from pipeline.checkpoints.device_memory import is_out_of_memory
from pipeline.engines.grouped import Shared
from pipeline.engines.memory import Packer, memory_message
from pipeline.generation.characters import whole_characters
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.guide import Guide
from pipeline.generation.lookup import USUAL_DRAFTS, Lookup
from pipeline.generation.reasoning import parted
from pipeline.generation.sampling import Sampling
from pipeline.generation.stopping import StopTexts
from pipeline.kernels import decoding
from pipeline.kernels.decoding import queries_of_a_range
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Prefilled
from pipeline.prompts.tokenizing import stop_token_ids
from pipeline.pruning.operations import dense_flops, fp8_tokens, layer_tokens, shares_of_dense
from pipeline.records import Answer, EncodedDocument, OneOfSeveral, Reasoning, RowError
from pipeline.settings.answer_settings import AnswerSettings, SamplingSettings

MOST_TOLD = 40  # characters of an answer that was cut


def row_of(document: EncodedDocument, method: str) -> Answer:
    """A document's row without an answer."""
    row = Answer.begin(document.source, method)
    row.document_tokens, row.prompt_tokens = document.document_tokens, document.prompt_tokens
    row.truncated_tokens, row.tokenize_ms = document.truncated_tokens, document.tokenize_ms
    return row


def failed(document: EncodedDocument, method: str, failure: RowError) -> Answer:
    """The error row of a document."""
    row = row_of(document, method)
    row.fail(failure)
    return row


def prefilled_rows(
    documents: Sequence[EncodedDocument],
    method: str,
    prefilled: Prefilled,
    model: LoadedModel,
    shared: Shared | None,
) -> list[Answer]:
    """The documents' rows with what their prefill came to, times left out."""
    shape = model.decoder.shape
    stored = prefilled.cache.prompt_tokens()
    rows = []
    for b, (document, passes) in enumerate(zip(documents, prefilled.by_document(), strict=True)):
        row = row_of(document, method)
        row.kept_tokens, row.ffn_tokens = layer_tokens(passes)
        row.ffn_fp8_tokens = fp8_tokens(passes, everywhere=model.decoder.linears_in_fp8)
        draft_flops = prefilled.draft_flops[b]
        for name, ratio in shares_of_dense(shape, passes, document.prompt_tokens, draft_flops).items():
            setattr(row, name, ratio)
        row.kv_bytes = sum(layer[b] for layer in stored) * shape.kv_bytes_per_token(
            model.decoder.dtype.itemsize
        )
        row.pack_documents, row.pack_tokens = len(documents), sum(prefilled.lengths)
        rows.append(row)
    if shared is not None:
        _tell_shared(rows, shared, model)
    return rows


def _tell_shared(rows: Sequence[Answer], shared: Shared, model: LoadedModel) -> None:
    """Say what rows share; of its operations each counts an equal part as its own."""
    shape = model.decoder.shape
    for row, flops, count in zip(rows, shared.flops, shared.group_rows, strict=True):
        row.method, row.shared_ms, row.group_rows = shared.method, shared.ms, count
        row.pack_tokens = shared.pack_tokens
        assert row.flops_ratio is not None
        assert row.prompt_tokens is not None
        row.flops_ratio -= flops * (1 - 1 / count) / dense_flops(shape, row.prompt_tokens)


def rules_of(settings: AnswerSettings, model: LoadedModel) -> StopRules:
    """Where the answers of a model end."""
    return StopRules(
        max_new_tokens=settings.max_new_tokens,
        token_ids=stop_token_ids(model.tokenizer, model.generation_config),
        texts=StopTexts(texts=settings.stop, tokenizer=model.tokenizer) if settings.stop else None,
    )


def sampling_of(settings: SamplingSettings) -> Sampling:
    """How the tokens of answers are drawn."""
    return Sampling(**{each.name: getattr(settings, each.name) for each in fields(Sampling)})


def lookup_of(wanted: int | None, sampling: Sampling, model: LoadedModel) -> Lookup | None:
    """How drafts are looked up, where they are: `wanted` many tokens, or None for what is best here.

    Tokens that are drawn are seldom those that stand in the prompt, and a draw of each draft takes time.
    """
    if wanted == 0 or (wanted is None and not sampling.is_greedy):
        return None
    drafts = wanted or USUAL_DRAFTS
    if decoding.available(model.device, model.decoder.dtype, model.shape.head_dim):
        drafts = min(drafts, queries_of_a_range(model.own.heads, model.own.kv_heads) - 1)
    return Lookup(drafts=drafts, adaptive=wanted is None) if drafts else None


def texts_of(
    tokens: Sequence[int], begins: Reasoning | None, rules: StopRules, model: LoadedModel
) -> tuple[str | None, str]:
    """The model's reasoning, None where there is none, and its answer, once it has ended.

    The answer ends before the first stop text in it, or else with its last whole character. `begins` is what
    the prompt says of reasoning.
    """
    own = parted(tokens, begins, model.tokenizer)
    reasons = own.reasoning is not None
    text = None if rules.texts is None else rules.texts.cut(own.tokens, head=own.head, trims=reasons)
    if text is None:
        text = own.head + whole_characters(own.tokens, model.tokenizer)
    return own.reasoning, text.lstrip() if reasons else text


def add_answers(row: Answer, generated: Sequence[Generated], model: LoadedModel) -> None:
    """Write the answers to a prompt, which have ended, into its row, as text and in numbers.

    Of several the first is the row's own; counts of tokens are of them all. Raises RowError, of the kind
    `incomplete`, where one does not have the form that it is to have.
    """
    answers = [_written(each, model) for each in generated]
    for name in ("answer", "reasoning", "finish_reason"):
        setattr(row, name, getattr(answers[0], name))
    add_logprobs(row, generated[0], model)
    row.answers = answers if len(answers) > 1 else None
    row.new_tokens = sum(each.new_tokens for each in answers)
    steps = [skipped for each in generated for skipped in each.skipped_ffns]
    if steps:
        row.skipped_ffn_ratio = sum(steps) / (len(steps) * model.shape.layers)
    drafted = [each for each in generated if each.drafts is not None]
    if drafted:
        row.draft_tokens = sum(each.drafts or 0 for each in drafted)
        row.accepted_tokens = sum(each.accepted for each in drafted)


def _written(generated: Generated, model: LoadedModel) -> OneOfSeveral:
    if generated.guide is None:
        reasoning, text = texts_of(generated.tokens, generated.reasoning, generated.rules, model)
    else:
        reasoning, text = formed_texts(generated, generated.guide, model)
    ended = "stop" if generated.finish_reason == "stop_text" else generated.finish_reason
    return OneOfSeveral(
        answer=text, reasoning=reasoning, finish_reason=ended, new_tokens=len(generated.tokens)
    )


def formed_texts(generated: Generated, guide: Guide, model: LoadedModel) -> tuple[str | None, str]:
    """The model's reasoning, None where there is none, and an answer in its form. Raises RowError."""
    if not guide.is_complete:
        raise RowError("incomplete", _incomplete(generated, guide))
    before = generated.tokens[: guide.start]
    reasoning = parted(before, Reasoning.BEGUN, model.tokenizer).reasoning if before else None
    return reasoning, guide.matcher.text


def _incomplete(generated: Generated, guide: Guide) -> str:
    count = f"{len(generated.tokens):,} tokens"
    if guide.matcher.error is not None:
        return f"after {count} the answer cannot go on in its form: {guide.matcher.error}"
    if guide.start is None:
        return f"the model reasoned for all of its {count}, and there is no answer: raise --max-new-tokens"
    text = guide.matcher.text
    told = f", and ends with {text[-MOST_TOLD:]!r}" if text else ""
    return (
        f"the answer was cut after {count}, before it had its form{told}: raise --max-new-tokens, or bound "
        "what may be long in it (in a schema by maxLength and maxItems)"
    )


def add_logprobs(row: Answer, generated: Generated, model: LoadedModel) -> None:
    """Write how likely the answer's tokens were, without those of reasoning, and how likely each choice."""
    if not generated.logprobs:
        return
    guide, start = generated.guide, 0
    if guide is not None:
        start = len(generated.tokens) if guide.start is None else guide.start
        row.choice_logprobs = guide.choice_logprobs
    elif generated.reasoning is not None:
        own = parted(generated.tokens, generated.reasoning, model.tokenizer)
        start = len(generated.tokens) - len(own.tokens)
    if logprobs := generated.logprobs[start : _end_of_text(row.answer or "", generated, model)]:
        row.mean_logprob, row.min_logprob = sum(logprobs) / len(logprobs), min(logprobs)


def _end_of_text(answer: str, generated: Generated, model: LoadedModel) -> int:
    """How many tokens there are up to the answer's last one: behind it is a stop text, if one ended it."""
    end = len(generated.tokens)
    while generated.finish_reason == "stop_text" and end:
        _, text = texts_of(generated.tokens[: end - 1], generated.reasoning, generated.rules, model)
        if not text.startswith(answer):
            break
        end -= 1
    return end


def describe(error: BaseException, document: EncodedDocument, packer: Packer) -> RowError:
    """What to say in a row whose prompt, or a pack with it, raised this error."""
    place = document.source.place
    if is_out_of_memory(error):
        return RowError("out_of_memory", memory_message(document, packer))
    if isinstance(error, RowError):
        return RowError(error.kind, f"{place}: {error}")
    return RowError("internal", f"{place}: {type(error).__name__}: {error}")
