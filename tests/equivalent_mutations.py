"""Mutations that change no result of the program, by file: description → (source, reason).

``source`` is a part of the line that is changed: the same mutation may matter on another line. A
list has an entry for each of several lines.
Read before an entry is added: a reason that is not an argument belongs to a test that is missing.
"""

from __future__ import annotations

SPEED = "how much is computed at once; the result is the same"
ORDER = "both are done, in either order"
GUARD = "a guard against division by 0, far below any other value"
CANCELS = "the factor cancels in the scale of the gradient"
ONE_DEVICE = "all of them are on one device"
GPU = "runs on a GPU only, where the tests marked gpu cover it"

Entry = tuple[str, str]
EQUIVALENT: dict[str, dict[str, Entry | list[Entry]]] = {
    "nanochat_ray/checkpoint/checkpoint.py": {
        "arguments: contextlib.suppress(OSError, ValueError)  →  "
        "contextlib.suppress(ValueError, OSError)": ("", "both are suppressed"),
        "constant: 1  →  2": ("indent=1", "spaces of a JSON text"),
    },
    "nanochat_ray/cli/eval.py": {
        "constant: True  →  False": ("flush=True", "it is printed later"),
    },
    "nanochat_ray/cli/quickstart.py": {
        "constant: 30  →  31": ("1 << 30", "beyond any depth or number of GPUs"),
    },
    "nanochat_ray/cli/quickstart_plan.py": {
        "constant: 19000  →  19001": ("", "far below the rounding of a plan"),
        "constant: 15000  →  15001": ("", "far below the rounding of a plan"),
        "constant: 1050000  →  1050001": ("", "far below the rounding of a plan"),
        "constant: 0.0  →  0.5": ("max(0.0, progress.left_s", "half a second is 0.0 minutes"),
    },
    "nanochat_ray/cli/rollback.py": {
        "statement: time.sleep(POLL_S)  →  pass": ("", "it looks more often"),
    },
    "nanochat_ray/engine/sampler.py": {
        "function: min(V, max(1, rows.widest))  →  max(V, max(1, rows.widest))": ("", SPEED),
        "comparison: cumulative[:, -1] < goal  →  cumulative[:, -1] <= goal": ("", SPEED),
        "sign or not: -1  →  1": ("short = nucleus", SPEED),
        "operator: features & NUCLEUS  →  features | NUCLEUS": ("", SPEED),
        "comparison: logits > 0  →  logits >= 0": ("", "0 divided or multiplied is 0"),
        "operator: features & MIN_P  →  features | MIN_P": ("", "a min-p of 0 masks nothing"),
    },
    "nanochat_ray/engine/sampling_state.py": {
        "operator: p.min_tokens and sequence.stop_token_ids  →  "
        "p.min_tokens or sequence.stop_token_ids": ("", "no tokens, or none early, are banned"),
        "operator: features & BAN  →  features | BAN": ("", SPEED),
        "operator: features & BAN and parameters.bans is not None  →  "
        "features & BAN or parameters.bans is not None": ("", SPEED),
        "constant: 1  →  2": ("triton_sampler.MAX_VOCAB", GPU),
        "condition: if self.vocab_size > triton_sampler.MAX_VOCAB:  →  "
        "if not self.vocab_size > triton_sampler.MAX_VOCAB:": ("", GPU),
    },
    "nanochat_ray/engine/grammar.py": {
        "constant: 1  →  2": ("allocate_token_bitmask(1", "a second row, which nobody reads"),
    },
    "nanochat_ray/engine/json_schema.py": {
        "constant: 0  →  1": ('schema.get("min', "both are less than the bound that is set"),
    },
    "nanochat_ray/engine/stats.py": {
        "constant: 0  →  1": [
            (field, "the engine replaces it in all that it returns")
            for field in ("num_lookup_tokens", "num_hit_tokens", "num_queued", "preemptions")
        ],
    },
    "nanochat_ray/engine/detokenizer.py": {
        "comparison: self._inside >= 0  →  self._inside > 0": ("", "no delimiter has the id 0"),
    },
    "nanochat_ray/engine/draft.py": {
        "statement: self._num_indexed = total  →  pass": ("", "n-grams are indexed again"),
        "constant: 0  →  1": ("_num_indexed", "no n-gram ends before 1"),
    },
    "nanochat_ray/engine/in_flight.py": {
        "statement: logprobs.fetch()  →  pass": ("logprobs.fetch()", GPU),
        "statement: event.record(torch.cuda.current_stream(token_ids.device))  →  pass": ("", GPU),
        "arguments: LogprobTable(logits, token_ids, [])  →  LogprobTable(token_ids, logits, [])": (
            "",
            "nothing is read of a table without requests",
        ),
    },
    "nanochat_ray/engine/loop.py": {
        "constant: 0.0  →  0.5": ("until - time.monotonic()", "half a second of a limit of 30"),
        "constant: 0  →  1": ("_job_clock.end(0)", "any step of a job may compile a kernel"),
    },
    "nanochat_ray/engine/logprobs.py": {
        "constant: 0  →  1": ("tokens = [0]", "of rows whose log-probability nobody reads"),
    },
    "nanochat_ray/engine/scheduler.py": {
        "constant: 1  →  2": ("self._last_admission.get(", "both are less than the first, 0"),
        "sign or not: -1  →  1": ("default=-1", "admissions are counted from any number on"),
        "comparison: self.num_preemptions > num_preemptions  →  "
        "self.num_preemptions >= num_preemptions": ("", "else every chunk has a slot"),
    },
    "nanochat_ray/engine/step_plan.py": {
        "comparison: self._scratch.numel() < threads * self._writer.scratch_size  →  "
        "self._scratch.numel() <= threads * self._writer.scratch_size": ("", SPEED),
    },
    "nanochat_ray/engine/sequence.py": {
        "constant: 1  →  2": ("PLACEHOLDER = -1", "any id that is no token"),
    },
    "nanochat_ray/model/attention.py": {
        "constant: 2  →  3": ("is_grouped", "heads that are not grouped are groups of one"),
        "operator: k_start + MASK_BLOCK  →  k_start - MASK_BLOCK": (
            "k_start + MASK_BLOCK <= length",
            "visible keys are not behind the queries, which are within the sequence",
        ),
        "operator: T - 1  →  T + 1": ("", "the mask that hides nothing beyond the diagonal"),
        "constant: False  →  True": ("torch.compile(flex_attention, dynamic=False)", GPU),
        "constant: True  →  False": ("stable=True", "the sort of few numbers is stable"),
        "comparison: k_end <= q_start  →  k_end < q_start": ("", "a block of one is never whole"),
    },
    "nanochat_ray/model/loss.py": {
        "function: max(16, CHUNK // vocab)  →  min(16, CHUNK // vocab)": ("", SPEED),
        "operator: CHUNK // vocab  →  CHUNK * vocab": ("", SPEED),
        "constant: 16  →  17": ("CHUNK // vocab", SPEED),
        "constant: 13  →  14": ("1 << 13", SPEED),
        "operator: 1 << 13  →  1 >> 13": ("", SPEED),
        "operator: 1 << 20  →  1 >> 20": ("CHUNK = 1 << 20", SPEED),
        "constant: 20  →  21": ("CHUNK = 1 << 20", SPEED),
        "constant: 1  →  2": [("CHUNK = 1 << 20", SPEED), ("1 << 13", SPEED)],
        "comparison: hidden.device.type == 'cpu'  →  hidden.device.type != 'cpu'": ("", SPEED),
        "condition: max(16, CHUNK // vocab) if hidden.device.type == 'cpu' else 1 << 13  →  "
        "max(16, CHUNK // vocab) if not hidden.device.type == 'cpu' else 1 << 13": ("", SPEED),
        "arguments: grad.addcmul_(grad, tanh.square_(), value=-1)  →  "
        "grad.addcmul_(tanh.square_(), grad, value=-1)": ("", "a product of both"),
        "operator: grad_hidden is None or grad_weight is None  →  "
        "grad_hidden is None and grad_weight is None": ("", "both are None, or neither"),
        "constant: False  →  True": ("grad=False", SPEED),
    },
    "nanochat_ray/model/rotary.py": {
        "comparison: factor > 1  →  factor >= 1": ("", "YaRN by the factor 1 changes no frequency"),
    },
    "nanochat_ray/on_ray/serve/client.py": {
        "operator: self.liveness_timeout_s / 10  →  self.liveness_timeout_s * 10": (
            "HEARTBEAT_S",
            "a silence is noticed up to HEARTBEAT_S later",
        ),
    },
    "nanochat_ray/train/metrics.py": {
        "constant: 0  →  1": ("self.start_clock(0)", "it starts again before the first step"),
    },
    "nanochat_ray/train/validation.py": {
        "comparison: dist.get_world_size() > 1  →  dist.get_world_size() >= 1": (
            "",
            "the sum over one rank",
        ),
    },
    "nanochat_ray/on_ray/serve/routing.py": {
        "constant: 1  →  2": ("if is_near else 1", "any number behind those of cached blocks"),
    },
    "nanochat_ray/train/recipe.py": {
        "constant: 1  →  2": ("max(tokens, 1)", GUARD),
    },
    "nanochat_ray/train/throughput.py": {
        "statement: model.init_weights(torch.Generator().manual_seed(0))  →  pass": (
            "",
            "steps are timed, whatever the weights",
        ),
    },
    "nanochat_ray/train/step.py": {
        "operator: config.global_batch_size * (batch.ids.shape[1] - 1)  →  "
        "config.global_batch_size / (batch.ids.shape[1] - 1)": ("", CANCELS),
        "operator: batch.ids.shape[1] - 1  →  batch.ids.shape[1] + 1": ("nominal", CANCELS),
        "constant: True  →  False": ("non_blocking=True", SPEED),
        "constant: 0  →  1": ("optimizer.flats[0].weights.device", ONE_DEVICE),
        "constant: 1  →  2": [
            ("max(initial=1)", "one more column, of which nothing is trained"),
            ("generate_state(1)[0]", "the first of two numbers is that of one"),
        ],
    },
    "nanochat_ray/serve/metrics.py": {
        "arguments: self._both(self._one.gauge(*args), self._other.gauge(*args))  →  "
        "self._both(self._other.gauge(*args), self._one.gauge(*args))": ("", ORDER),
        "arguments: self._both(self._one.counter(*args), self._other.counter(*args))  →  "
        "self._both(self._other.counter(*args), self._one.counter(*args))": ("", ORDER),
        "arguments: self._both(self._one.histogram(*args), self._other.histogram(*args))  →  "
        "self._both(self._other.histogram(*args), self._one.histogram(*args))": ("", ORDER),
    },
    "nanochat_ray/rl/losses.py": {
        "constant: 1  →  2": ("int(sequences.max()) + 1", "one more sequence, of no token"),
        "constant: 1e-09  →  1.5000000000000002e-09": ("", GUARD),
    },
    "nanochat_ray/rl/batch.py": {
        "constant: 1  →  2": ("max(len(logprobs), 1)", "a group has two samples or more"),
    },
    "nanochat_ray/train/trainer.py": {
        "constant: 0  →  1": ("gc.get_freeze_count() > 0", "a frozen process has thousands"),
        "comparison: self.completed_steps < steps  →  self.completed_steps <= steps": (
            "",
            "the loop has the same bound",
        ),
    },
    "nanochat_ray/optim/muon.py": {
        "condition: if isinstance(lr, Tensor):  →  if not isinstance(lr, Tensor):": (
            "",
            "both subtract the product; one waits for a GPU",
        ),
        "operator: update * weights  →  update / weights": (
            "",
            "of the same sign but at a weight of 0, whose decay is 0",
        ),
        "constant: 1e-07  →  1.5e-07": ("", GUARD),
        "constant: 1e-20  →  1.4999999999999998e-20": ("", GUARD),
        "constant: 1e-10  →  1.5e-10": ("", GUARD),
        "constant: 3  →  4": ("ndim == 3", SPEED),
    },
    "nanochat_ray/optim/device_update.py": {
        "constant: 0.0  →  0.5": (
            "grads * rates.grad_factor, 0.0",
            "its learning rate and its weight in the momentum are 0",
        ),
        "constant: False  →  True": ("torch.compile(_muon_update_, dynamic=False)", GPU),
    },
    "nanochat_ray/model/config.py": {
        "operator: n_layer - 1  →  n_layer + 1": ("", "of the same parity"),
    },
    "nanochat_ray/optim/schedule.py": {
        "comparison: remaining >= warmdown  →  remaining > warmdown": ("", "both are 1 there"),
    },
    "nanochat_ray/serve/auth.py": {
        "constant: 19  →  20": ("length[:19]", "both are more bytes than there are"),
        "constant: 0  →  1": ("length.isdigit() else 0", "a byte is less than any bound"),
    },
    "nanochat_ray/optim/sharded.py": {
        "condition: if not self._scatters:  →  if not not self._scatters:": ("", SPEED),
        "constant: 0  →  1": ("self.flats[0].weights.device", ONE_DEVICE),
        "constant: False  →  True": [
            ("compile_update: bool = False", GPU),
            ("self._last_backward = False", "zero_grad comes before each step"),
        ],
        "comparison: dist.get_backend() == 'nccl'  →  dist.get_backend() != 'nccl'": ("", SPEED),
        "constant: True  →  False": ("async_op=True", SPEED),
        "comparison: norm > clip  →  norm >= clip": ("", "a factor of 1"),
        "statement: machine.finish_copies(self.flats[0].weights.device)  →  pass": ("", GPU),
        "operator: 1 << 20  →  1 >> 20": ("LARGE_TABLE", SPEED),
        "constant: 20  →  21": ("LARGE_TABLE", SPEED),
        "comparison: parameters[name].numel() >= LARGE_TABLE  →  "
        "parameters[name].numel() > LARGE_TABLE": ("", SPEED),
        "constant: 1  →  2": ("LARGE_TABLE", SPEED),
    },
    "nanochat_ray/serve/sse.py": {
        "arguments: asyncio.gather(task, watch, return_exceptions=True)  →  "
        "asyncio.gather(watch, task, return_exceptions=True)": ("", ORDER),
        "arguments: asyncio.gather(sending, watch, return_exceptions=True)  →  "
        "asyncio.gather(watch, sending, return_exceptions=True)": ("", ORDER),
    },
    "nanochat_ray/serve/serving.py": {
        "arguments: cache_scope(client, body.cache_salt or '')  →  "
        "cache_scope(body.cache_salt or '', client)": ("", "a hash of both, in either order"),
        "constant: 0  →  1": ("num_hidden: int = 0", "of chats, whose tokens have no offsets"),
    },
    "nanochat_ray/engine/engine.py": {
        "comparison: chunk.start < len(s.request.prompt)  →  "
        "chunk.start <= len(s.request.prompt)": ("", "the prompt is committed again, unchanged"),
    },
    "nanochat_ray/optim/flat.py": {
        "operator: 1 << 18  →  1 >> 18": ("", SPEED),
        "constant: 0  →  1": ("missing: int = 0", "last_backward sets it"),
        "constant: False  →  True": ("in_flight: bool = False", "last_backward sets it"),
        "constant: 18  →  19": ("1 << 18", SPEED),
        "constant: 1  →  2": ("1 << 18", SPEED),
    },
    "nanochat_ray/data/packing.py": {
        "comparison: room > size  →  room >= size": ("", "a sequence without room fits none"),
    },
    "nanochat_ray/data/split.py": {
        "comparison: end >= 0  →  end > 0": ("", "a separator at 0 ends a chunk of one character"),
    },
    "nanochat_ray/engine/kvcache/attention_metadata.py": {
        "arguments: send(pack(tensors), device)  →  send(device, pack(tensors))": ("", GPU),
    },
    "nanochat_ray/engine/kvcache/prefix_store.py": {
        "constant: 0  →  1": ("self._blocks[0].nbytes", "all blocks have one size"),
    },
    "nanochat_ray/engine/kvcache/paged_manager.py": {
        "comparison: len(tables[0]) > before  →  len(tables[0]) >= before": (
            "",
            "equal block tables are written again",
        ),
    },
    "nanochat_ray/model/block.py": {
        "operator: value is not None and self.ve_gate is not None  →  "
        "value is not None or self.ve_gate is not None": ("", "both are None, or neither"),
    },
    "nanochat_ray/model/gpt.py": {
        "comparison: angles[0].size(0) < T  →  angles[0].size(0) <= T": ("", SPEED),
        "comparison: angles[0].device != device  →  angles[0].device == device": ("", SPEED),
        "constant: 0  →  1": ("angles[0].size(0) < T", SPEED),
        "function: max(T, c.context_len)  →  min(T, c.context_len)": ("", SPEED),
        "constant: 1.0  →  1.5": ("self.window_share = 1.0", "a share from 1 on is the whole"),
    },
}
