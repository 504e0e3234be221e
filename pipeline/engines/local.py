"""Answers packs of documents in this process, on one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from pipeline.bench.flops import attention_ratio, dense_flops, fp8_tokens, layer_tokens, passes_flops
from pipeline.engines.keeping import keep_selection
from pipeline.engines.memory import Packer
from pipeline.errors import MarsError, RowError, is_failure
from pipeline.model.decode import Generated, StopRules, decode
from pipeline.model.graphs import FEWEST_STEPS, WARM_UP_STEPS
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.model.sampling import Sampler, Sampling
from pipeline.pruning.base import PruningMethod
from pipeline.records import Answer, EncodedDocument, Row, Spans
from pipeline.summary import EngineTimes

# of the longer of the two documents that warm up: kernels are chosen by size, and some load when first chosen
WARM_UP_TOKENS = {"cpu": 64, "cuda": 4096}
SHORT_WARM_UP_TOKENS = 64
# of an answer that is long enough for its steps to be captured as a CUDA graph, and replayed a few times
WARM_UP_NEW_TOKENS = {"cpu": 2, "cuda": 1 + WARM_UP_STEPS + FEWEST_STEPS + 3}
LONGEST_WARM_UP_S = 60.0


class LocalEngine:
    """One loaded model with one method: documents in, answers out, failures as rows."""

    def __init__(
        self,
        model: LoadedModel,
        method: PruningMethod,
        *,
        rules: StopRules,
        sampling: Sampling,
        pack_tokens: int | None = None,
        row_timeout: float | None = None,
        kv_memory: int | None = None,
        save_selection: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.method, self.rules, self.sampling = model, method, rules, sampling
        self.row_timeout, self.check, self.save_selection = row_timeout, check, save_selection
        self.times = EngineTimes()
        shape, self.itemsize = model.adapter.shape, model.adapter.dtype.itemsize
        self.packer = Packer.on(
            model.device,
            method,
            shape,
            itemsize=self.itemsize,
            new_tokens=rules.max_new_tokens,
            pack_tokens=pack_tokens,
            kv_memory=kv_memory,
        )

    def warm_up(self, limit_s: float) -> bool:
        """Load kernels and libraries with throw-away documents, so that no row's TTFT pays for it.

        A short document, then, on a GPU, one of the length of a usual pack, whose decode steps are captured.
        Whether all ran: after `limit_s` seconds the warm-up is given up, between two layers.
        """
        started = time.perf_counter()

        def check() -> None:
            self.check()
            if time.perf_counter() - started > limit_s:
                raise RowError("timeout", f"the warm-up took longer than {limit_s:g} s")

        kind = self.model.device.type
        new_tokens = min(self.rules.max_new_tokens, WARM_UP_NEW_TOKENS[kind])
        room = self.model.adapter.shape.context - new_tokens
        # packs of one token mean one document at a time, of whatever length
        usual = self.packer.pack_tokens if self.packer.pack_tokens > 1 else WARM_UP_TOKENS[kind]
        short = min(room, SHORT_WARM_UP_TOKENS)
        longest = max(short, min(room, usual, WARM_UP_TOKENS[kind]))
        # whatever the answers say, they go on: an early stop would leave nothing to capture
        rules = StopRules(max_new_tokens=new_tokens)
        ran = True
        for length in sorted({short, longest}):
            # not under the row's time limit: loading kernels takes as long as it takes
            ran = ran and self._rehearse(length, rules, check)
        self.times = EngineTimes(warm_up_s=self._now() - started)
        return ran

    def _rehearse(self, length: int, rules: StopRules, check: Callable[[], None]) -> bool:
        """Answer a document of so many tokens; False where there was no time for it."""
        ids = np.arange(length, dtype=np.int64) % self.model.adapter.shape.vocab
        spans = Spans(document=(0, length), question=(length, length))
        document = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
        try:
            self._answer([document], rules, check)
        except RowError as error:  # where even this exceeds --kv-memory, say, the rows will say so
            return error.kind != "timeout"
        except torch.OutOfMemoryError:  # likewise
            pass
        else:
            return True
        self._free()  # outside the handler, whose traceback keeps the failed pack's tensors alive
        return True

    def answer(self, pack: Sequence[EncodedDocument]) -> list[Answer]:
        """Answers in the pack's order. A pack that fails is halved until the culprit stands alone."""
        if len(pack) == 1 and self.model.device.type == "cpu":
            needed = self.packer.planned_bytes([pack[0].prompt_tokens])
            if needed > self.packer.max_bytes:  # the system would kill the process, with no error to catch
                return [self._failed(pack[0], "out_of_memory", self._memory_message(pack[0]))]
        answers = self._attempt(pack)
        if isinstance(answers, list):
            return answers
        if len(pack) == 1:
            kind, message = answers
            # a second time, in memory that the larger packs before it no longer hold in pieces
            again = self._attempt(pack) if kind == "out_of_memory" else answers
            return again if isinstance(again, list) else [self._failed(pack[0], kind, message)]
        half = len(pack) // 2
        return [*self.answer(pack[:half]), *self.answer(pack[half:])]

    def _attempt(self, pack: Sequence[EncodedDocument]) -> list[Answer] | tuple[str, str]:
        """Answers, or the kind and message of what went wrong, with the memory freed."""
        try:
            return self._answer(pack, self.rules, partial(self._check, time.perf_counter()))
        except MarsError:
            raise
        except BaseException as error:  # whatever one row does, the others get their answers
            if not is_failure(error):
                raise
            failure = self._describe(error, pack[0])
        self._free()  # outside the handler, whose traceback keeps the failed pack's tensors alive
        return failure

    def _free(self) -> None:
        """Give back the memory of a pack that failed."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(
        self, documents: Sequence[EncodedDocument], rules: StopRules, check: Callable[[], None]
    ) -> list[Answer]:
        adapter, attention = self.model.adapter, self.model.attention
        started = self._now()
        pack = Pack.of(documents, self.model.device)
        limits = self.packer.limits
        marks = (True,) if self.save_selection else ()
        prefilled = prefill(
            adapter, attention, self.method, pack, rules.max_new_tokens, check, limits, *marks
        )
        prefill_ms = (self._now() - started) * 1e3
        sampler = Sampler(self.sampling, [document.source.row for document in documents])
        first_tokens = sampler.draw(prefilled.logits_BV, range(len(documents)))
        first_at = self._now()
        rows = self._statistics(documents, prefilled)
        generated = decode(adapter, attention, prefilled, first_tokens, sampler, rules, check)
        for row, document, tokens in zip(rows, documents, generated, strict=True):
            row.queue_ms = (started - document.ready_at) * 1e3
            row.prefill_ms = prefill_ms
            row.ttft_ms = (first_at - started) * 1e3
            row.decode_ms = (tokens.finished_at - first_at) * 1e3
            row.pack_documents, row.pack_tokens = len(documents), pack.segments.total
            row.kv_host_bytes, row.kv_swapped_bytes = prefilled.cache.traffic()
            self._finish(row, tokens)
        if self.save_selection:
            keep_selection(rows, documents, prefilled, self.model)
        self.times.add(started, first_at, max(tokens.finished_at for tokens in generated))
        return rows

    def _statistics(self, documents: Sequence[EncodedDocument], prefilled: Prefilled) -> list[Answer]:
        shape = self.model.adapter.shape
        stored = prefilled.cache.prompt_tokens()
        rows = []
        for b, (document, passes) in enumerate(zip(documents, prefilled.by_document(), strict=True)):
            row = self._row(document)
            row.kept_tokens, row.ffn_tokens = layer_tokens(passes)
            row.ffn_fp8_tokens = fp8_tokens(passes, everywhere=self.model.adapter.linears_in_fp8)
            everywhere = shape.layers * document.prompt_tokens
            row.kept_ratio = sum(row.kept_tokens) / everywhere
            row.ffn_ratio = sum(row.ffn_tokens) / everywhere
            row.attention_ratio = attention_ratio(shape, passes, document.prompt_tokens)
            row.flops_ratio = passes_flops(shape, passes) / dense_flops(shape, document.prompt_tokens)
            row.kv_bytes = sum(layer[b] for layer in stored) * shape.kv_bytes_per_token(self.itemsize)
            rows.append(row)
        return rows

    def _row(self, document: EncodedDocument) -> Answer:
        row = Answer.begin(document.source, self.method.name)
        row.document_tokens, row.prompt_tokens = document.document_tokens, document.prompt_tokens
        row.truncated_tokens, row.tokenize_ms = document.truncated_tokens, document.tokenize_ms
        return row

    def _finish(self, row: Answer, generated: Generated) -> None:
        text = self.model.tokenizer.decode(generated.tokens, skip_special_tokens=True)
        found = [text.index(stop) for stop in self.rules.texts if stop in text]
        row.answer = text[: min(found)] if found else text
        row.new_tokens = len(generated.tokens)
        row.finish_reason = "stop" if generated.finish_reason == "stop_text" else generated.finish_reason

    def _failed(self, document: EncodedDocument, kind: str, message: str) -> Answer:
        row = self._row(document)
        row.status, row.error_type, row.error_message = "error", kind, message
        return row

    def _describe(self, error: BaseException, document: EncodedDocument) -> tuple[str, str]:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return "out_of_memory", self._memory_message(document)
        if isinstance(error, RowError):
            return error.kind, f"{document.source.place}: {error}"
        return "internal", f"{document.source.place}: {type(error).__name__}: {error}"

    def _memory_message(self, document: EncodedDocument) -> str:
        needed = self.packer.planned_bytes([document.prompt_tokens])
        return (
            f"{document.source.place}: {document.prompt_tokens} tokens need about {needed / 1e9:.1f} GB on "
            f"{self.model.device} and {self.packer.max_bytes / 1e9:.1f} GB are usable; "
            "--on-overlong does not help here: shorten the document, or use a smaller --dtype or model"
        )

    def _check(self, started: float) -> None:
        """Called between layers and steps: give up a pack that takes longer than one row may."""
        self.check()
        if self.row_timeout is not None and time.perf_counter() - started > self.row_timeout:
            raise RowError("timeout", f"not answered within --row-timeout {self.row_timeout:g} s")

    def _now(self) -> float:
        """Seconds, after all work on the device has ended."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
