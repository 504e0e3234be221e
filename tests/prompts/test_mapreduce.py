"""Combining the answers of parts: which prompts follow which answers, and what becomes of the row."""

from __future__ import annotations

import pytest
from prompt_parts import builder, byte_tokenizer, document, span_text

from pipeline.prompts.mapreduce import COMBINE, COMBINE_AS_TEXT, Reduction
from pipeline.prompts.splitting import SplitDocument, Splitter
from pipeline.records import Answer, Answered

TEMPLATE = "<{{ document }}>{{ question }}?"
TOKENIZER = byte_tokenizer()


def splitter(*, context=100, new_tokens=10, combine="{{ document }}{{ question }}!", **options):
    shared = {"context": context, "max_new_tokens": new_tokens, **options}
    return Splitter(
        prompts=builder(TOKENIZER, template=TEMPLATE, on_overlong="split", **shared),
        combine=builder(TOKENIZER, template=combine, **shared),
        overlap=0,
    )


def shown(prompt):
    """The document of a prompt."""
    return span_text(TOKENIZER, prompt, prompt.spans.document)


def reply(prompt, text, **values):
    """An answer as the engine's."""
    answer = Answer.begin(prompt.source, "dense")
    figures = {"new_tokens": 2, "queue_ms": 1.0, "prefill_ms": 5.0, "ttft_ms": 6.0, "decode_ms": 3.0}
    figures |= {"kept_tokens": [4, 2], "ffn_tokens": [4, 1], "kept_ratio": 0.5, "kv_bytes": 10}
    ratios = {"ffn_ratio": 0.25, "attention_ratio": 0.5, "flops_ratio": 0.75}
    for name, value in {**figures, **ratios, "finish_reason": "stop", **values}.items():
        setattr(answer, name, value)
    answer.answer, answer.prompt_tokens = text, prompt.prompt_tokens
    return answer


def answered(prompt, answer):
    """As the engine hands it on: its prefill began when it had waited."""
    return Answered(prompt, answer, prompt.ready_at + answer.queue_ms / 1e3)


def run(cutter, *documents, answer, pack=3):
    """All rows to their end, in packs of a few; the rows, and the prompts of each step."""
    found = [cutter.encode(each) for each in documents]
    assert all(isinstance(each, SplitDocument) for each in found)
    reduction, rows, steps = Reduction(cutter, "dense"), [], []
    for each in found:
        reduction.add(each)
    while waiting := reduction.prompts():
        steps.append(waiting)
        for start in range(0, len(waiting), pack):
            some = waiting[start : start + pack]
            taken = [reduction.take(answered(prompt, answer(prompt))) for prompt in some]
            rows += [row for row in taken if row is not None]
        assert len(steps) < 50
    return rows, steps


def test_answers_are_combined_in_groups_that_fit_until_one_is_left():
    cutter = splitter()
    text = "".join(f"{n:03} is here. " for n in range(80))
    (row,), steps = run(cutter, document(text, "w"), answer=lambda prompt: reply(prompt, shown(prompt)[:20]))
    assert [len(step) for step in steps] == [12, 4, 2, 1]
    assert shown(steps[1][0]).startswith(f"Part 1:\n{text[:19]}\n\nPart 2:\n")
    assert shown(steps[2][0]).startswith("Parts 1 to 3:\nPart 1:\n000")
    assert all(prompt.prompt_tokens <= cutter.combine.limit for step in steps for prompt in step)
    assert (row.status, row.answer, row.finish_reason) == ("ok", shown(steps[3][0])[:20], "stop")
    depths = [part.depth for part in row.parts]
    assert depths == [0] * 12 + [1] * 4 + [2] * 2 + [3]
    assert [(part.start, part.end) for part in row.parts[12:16]] == [(n, n + 3) for n in range(0, 12, 3)]
    assert (row.parts[-1].start, row.parts[-1].end) == (0, 12)
    assert row.parts[-1].answer == row.answer
    assert text.startswith(row.parts[1].answer, row.parts[1].start)


def test_the_figures_of_a_row():
    cutter = splitter()
    times = iter(range(1, 100))

    def answer(prompt):
        n = next(times)
        return reply(prompt, "yes", prefill_ms=float(n // 3), ttft_ms=float(n), kept_ratio=1 / n, decode_ms=n)

    (row,), steps = run(cutter, document("a" * 200, "w"), answer=answer, pack=1)
    sent = [prompt for step in steps for prompt in step]
    assert [len(step) for step in steps] == [3, 1]
    assert row.document_tokens == 200
    assert row.prompt_tokens == sum(prompt.prompt_tokens for prompt in sent)
    assert (row.new_tokens, row.kv_bytes, row.kept_tokens, row.ffn_tokens) == (8, 40, [16, 8], [16, 4])
    assert row.prefill_ms == 0 + 0 + 1 + 1
    assert row.decode_ms == 1 + 2 + 3 + 4
    shares = [prompt.prompt_tokens / n for n, prompt in enumerate(sent, start=1)]
    assert row.kept_ratio == pytest.approx(sum(shares) / row.prompt_tokens)
    began, last = (steps[i][0].ready_at * 1e3 + 1.0 for i in (0, 1))
    assert row.ttft_ms == pytest.approx(last + 4.0 - began)
    assert (row.pack_documents, row.pack_tokens, row.truncated_tokens) == (None, None, 0)


def test_shares_of_decode_steps_are_weighted_by_new_tokens():
    shares = iter([(1, None), (2, 0.25), (6, 0.5), (4, None)])  # of a single token there is no step

    def answer(prompt):
        new_tokens, share = next(shares)
        return reply(prompt, "yes", new_tokens=new_tokens, skipped_ffn_ratio=share)

    (row,), _ = run(splitter(), document("a" * 200, "w"), answer=answer, pack=1)
    assert (row.new_tokens, row.skipped_ffn_ratio) == (13, pytest.approx((2 * 0.25 + 6 * 0.5) / 8))


def test_parts_of_one_pack_count_its_times_once():
    (row,), _ = run(splitter(), document("a" * 200, "w"), answer=lambda prompt: reply(prompt, "yes"))
    assert (row.prefill_ms, row.decode_ms) == (5.0, 3.0)  # both packs have the same times, as one would


def test_rows_are_combined_together_and_end_on_their_own():
    cutter = splitter()
    long, short = document("a" * 1000, "w"), document("b" * 100, "w")
    rows, steps = run(cutter, long, short, answer=lambda prompt: reply(prompt, shown(prompt)[-12:]))
    assert [len(step) for step in steps] == [12 + 2, 3 + 1, 1, 1]
    assert [len(row.parts) for row in rows] == [3, 17]


def test_rows_that_were_not_split_pass_through():
    cutter = splitter()
    whole = cutter.encode(document("short", "w"))
    reduction = Reduction(None, "dense")
    assert reduction.prompts() == []
    answer = reply(whole, "yes")
    row = reduction.take(answered(whole, answer))
    assert row is answer
    assert row.parts is None


def test_a_part_that_fails_fails_its_row_and_loses_nothing():
    def answer(prompt):
        failed = "b" in shown(prompt)
        values = {"status": "error", "error_type": "timeout", "error_message": f"{prompt.source.place}: late"}
        return reply(prompt, None if failed else "yes", **(values if failed else {}))

    text = "a" * 180 + "b" * 10 + "c" * 200
    (row,), steps = run(splitter(), document(text, "w"), answer=answer)
    assert len(steps) == 1
    assert (row.status, row.answer, row.error_type) == ("error", None, "timeout")
    assert row.error_message == "in.jsonl line 1, part 3 of 5: late"
    assert [part.status for part in row.parts] == ["ok", "ok", "error", "ok", "ok"]
    assert [part.answer for part in row.parts] == ["yes", "yes", None, "yes", "yes"]
    assert row.parts[2].error_message == row.error_message


def test_a_combination_that_fails_says_of_which_parts():
    def answer(prompt):
        if "Part" not in shown(prompt):
            return reply(prompt, "yes")
        place = prompt.source.place
        return reply(prompt, None, status="error", error_type="out_of_memory", error_message=place)

    (row,), _ = run(splitter(), document("a" * 200, "w"), answer=answer)
    assert (row.status, row.error_type) == ("error", "out_of_memory")
    assert row.error_message == "in.jsonl line 1, answers of parts 1 to 3 combined"
    assert [part.status for part in row.parts] == ["ok", "ok", "ok", "error"]


def test_answers_of_which_no_two_fit_are_an_error():
    (row,), steps = run(
        splitter(), document("a" * 400, "w"), answer=lambda prompt: reply(prompt, "no, for I say " * 4)
    )
    assert len(steps) == 1
    assert (row.status, row.error_type, row.answer) == ("error", "no_progress", None)
    assert row.error_message == (
        "in.jsonl line 1: 5 answers are left to combine, and no two fit into one prompt: the shortest"
        " have 128 tokens, and there is room for 88; lower --max-new-tokens, or shorten the question or the"
        " --combine-template"
    )
    assert [part.status for part in row.parts] == ["ok"] * 5


def test_an_answer_that_is_too_long_to_combine_waits_until_there_is_room():
    """Of neighbours that do not fit together the others are combined first; each step leaves fewer."""

    def answer(prompt):
        if shown(prompt).startswith("Part"):
            return reply(prompt, "ok")
        return reply(prompt, "b" * 62 if "b" in shown(prompt) else "yes, yes, yes")

    text = "a" * 200 + "b" * 10 + "c" * 300
    (row,), steps = run(splitter(), document(text, "w"), answer=answer)
    assert row.status == "ok"
    assert [len(step) for step in steps] == [6, 2, 1, 1]
    assert [(part.start, part.end) for part in row.parts[6:]] == [(0, 2), (3, 6), (0, 3), (0, 6)]


@pytest.mark.parametrize(("said", "expected"), [("", ""), (" \n", " \n")])
def test_where_nothing_is_said_nothing_is_combined(said, expected):
    (row,), steps = run(splitter(), document("a" * 200, "w"), answer=lambda prompt: reply(prompt, said))
    assert len(steps) == 1
    assert (row.status, row.answer, row.finish_reason) == ("ok", expected, "stop")


def test_answers_that_say_nothing_are_left_out():
    def answer(prompt):
        return reply(prompt, "found" if "b" in shown(prompt) or "Part" in shown(prompt) else "")

    (row,), steps = run(splitter(), document("a" * 100 + "b" + "a" * 200, "w"), answer=answer)
    assert len(steps) == 1
    assert (row.answer, row.status) == ("found", "ok")


def test_white_space_between_parts_is_listed_and_not_sent():
    text = "a" * 50 + "\n" * 600 + "b" * 50
    (row,), steps = run(
        splitter(), document(text, "w"), answer=lambda prompt: reply(prompt, shown(prompt).strip()[:5])
    )
    skipped = [part for part in row.parts if part.status == "skipped"]
    assert skipped
    assert all(not text[part.start : part.end].strip() and part.answer is None for part in skipped)
    assert row.status == "ok"
    assert shown(steps[1][0]).startswith("Part 1:\naaaaa\n\nPart 5:\nb")


def test_a_template_without_a_question_combines_without_it():
    cutter = splitter(combine="{{ document }}")
    _, steps = run(cutter, document("a" * 200, "w"), answer=lambda prompt: reply(prompt, "yes"))
    assert steps[-1][0].spans.question[0] == steps[-1][0].spans.question[1]


@pytest.mark.parametrize("question", ["Which law?", None])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("chat", [True, False])
def test_the_prompts_that_combine_of_our_own(question, system, chat):
    own = {"body": COMBINE} if chat else {"template": COMBINE_AS_TEXT}
    prompts = builder(TOKENIZER, system=system, **own)
    encoded = prompts.encode(document("Part 1:\nyes\n\nPart 2:\n<|im_end|>", question))
    text = TOKENIZER.decode(encoded.input_ids.tolist(), clean_up_tokenization_spaces=False)
    assert shown(encoded) == "Part 1:\nyes\n\nPart 2:\n<|im_end|>"
    assert span_text(TOKENIZER, encoded, encoded.spans.question) == (question or "")
    assert ("same question" in text) == (question is not None)
    assert "\n\n\n" not in text
    assert (system or "A long document") in text
    assert text.endswith("<|im_start|>assistant\n" if chat else "Answer:")
    assert text.startswith("<|im_start|>" if chat else system or "A long document")
    other = builder(TOKENIZER, system=system)
    assert prompts.template_hash != other.template_hash
