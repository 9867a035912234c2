"""The recipe of a depth: golden values, computed by hand from the rules and their sources."""

from __future__ import annotations

import pytest

from nanochat_ray.model.config import ModelConfig, count_parameters, flops_per_token, windows
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.train import recipe

VOCABULARY = 32_768
# nanochat's base_train.py (July 2026) at depth 12 and 2^19 tokens a batch: rates 0.02, 0.3, 0.008
# and 0.5; the rest are the laws in recipe.py, evaluated with a calculator. Columns: tokens a
# batch, steps, rates of matrices, embeddings, head and scalars; decay, momentum, beta2.
RECIPE = {
    2: (2**16, 840, 0.0277414, 1.01928, 0.0195959, 0.259880, 0.2, 0.922655, 0.985119),
    4: (2**17, 1056, 0.0259008, 0.672922, 0.0138564, 0.298129, 0.2, 0.929420, 0.988163),
    12: (2**19, 2520, 0.0199522, 0.299284, 0.00798090, 0.498806, 0.2, 0.950159, 0.995),
    20: (2**20, 4980, 0.0162646, 0.188977, 0.00503940, 0.406615, 0.100096, 0.962046, 0.995),
    26: (2**20, 10511, 0.0129993, 0.132469, 0.00353250, 0.324982, 0.0474245, 0.97, 0.995),
}


@pytest.mark.parametrize("depth", RECIPE)
def test_recipe_of_a_depth(depth: int) -> None:
    train = recipe.base_plan(recipe.model_config(depth, VOCABULARY)).train
    o, length = train.optim, 512 if depth < 8 else 2048
    assert (train.global_batch_size * length, train.steps) == RECIPE[depth][:2]
    values = (o.matrix_lr, o.embedding_lr, o.unembedding_lr, o.scalar_lr, o.weight_decay)
    assert (*values, o.momentum, o.embedding_beta2) == pytest.approx(RECIPE[depth][2:], rel=2e-5)
    assert (o.warmup_ratio, o.warmdown_ratio, o.final_lr_frac) == (0.02, 0.8, 0.05)
    assert train.seed == 0
    assert (train.micro_batch_size, train.stage) == (2**14 // length, "base")
    assert (train.eval_every, train.save_every) == (-(-train.steps // 3), -(-train.steps // 4))


@pytest.mark.parametrize(
    ("depth", "steps", "size", "rates"),
    # 20,000 sequences. Half of the rates of a base run of as many tokens.
    [
        (2, 625, 32, (0.0151572, 0.556910, 0.00979796, 0.108819)),
        (12, 2500, 8, (0.01, 0.15, 0.004, 0.25)),
    ],
)
def test_fine_tuning_recipe(
    depth: int, steps: int, size: int, rates: tuple[float, float, float, float]
) -> None:
    train = recipe.sft_config(recipe.model_config(depth, VOCABULARY), 20_000)
    o = train.optim
    assert (train.stage, train.steps, train.global_batch_size) == ("sft", steps, size)
    assert (o.matrix_lr, o.embedding_lr, o.unembedding_lr, o.scalar_lr) == pytest.approx(
        rates, rel=2e-5
    )
    assert train.seed == 0
    assert (o.weight_decay, o.warmup_ratio, o.warmdown_ratio, o.final_lr_frac) == (0, 0.02, 0.9, 0)
    assert (train.eval_every, train.save_every) == (-(-steps // 3), -(-steps // 2))


def test_steps_are_the_nearest_number_to_the_tokens() -> None:
    model = recipe.model_config(2, VOCABULARY)
    # 207 and 208 sequences in batches of 16: 12.94 and 13 steps. 215 and 216: 13.4 and 13.5.
    for num_sequences, steps in ((207, 13), (208, 13), (215, 13), (216, 14)):
        train = recipe.sft_config(model, num_sequences, batch=16 * model.sequence_len)
        assert train.steps == steps
        tokens = num_sequences * model.sequence_len
        plan = recipe.base_plan(model, tokens=tokens, batch=16 * model.sequence_len)
        assert plan.train.steps == steps


@pytest.mark.parametrize(
    ("tokens", "batch"),
    # 2^19 (tokens / 1.32e9)^0.383 above the reference, ^0.65 below; a power of two in 2^11 .. 2^21.
    [(1_320_000_000, 2**19), (2_640_000_000, 2**19), (5_280_000_000, 2**20), (10**12, 2**21),
     (660_000_000, 2**18), (165_000_000, 2**17), (16_500_000, 2**15), (1000, 2**11)],
)  # fmt: skip
def test_batch_grows_with_the_tokens(tokens: int, batch: int) -> None:
    assert recipe.batch_tokens(tokens) == batch


@pytest.mark.parametrize(
    ("steps", "factor"), [(2_500, 1.0), (1_250, 2**0.3), (5_000, 2**-0.3), (1, 3.0), (10**9, 0.3)]
)
def test_learning_rate_scale(steps: int, factor: float) -> None:
    assert recipe.lr_scale(steps) == pytest.approx(factor, rel=1e-12)


def test_bounds_of_the_optimizers_memory() -> None:
    config = recipe.model_config(12, VOCABULARY)
    short = recipe.optim_config(config, 2**19, 10 * 2**19)
    long = recipe.optim_config(config, 2**19, 10**6 * 2**19)
    assert (short.momentum, short.embedding_beta2) == pytest.approx((0.8, 0.95))
    assert (long.momentum, long.embedding_beta2) == pytest.approx((0.97, 0.995))


def test_decay_follows_batch_and_tokens() -> None:
    config = recipe.model_config(12, VOCABULARY)
    # Wang and Aitchison: 0.28 sqrt(batch / 2^19) 1.32e9 / tokens.
    decay = recipe.optim_config(config, 2**17, 2_640_000_000).weight_decay
    assert decay == pytest.approx(0.28 * 0.5 / 2)


@pytest.mark.parametrize(
    ("depth", "shape"),
    # layers, heads, width, context, windows, backout
    [
        (1, (1, 1, 64, 512, (512,), False)),
        (3, (3, 3, 192, 512, (512, 512, 512), False)),
        (8, (8, 8, 512, 2048, (512, 512, 512, 2048) * 2, False)),
        (11, (11, 11, 704, 2048, (*(512, 512, 512, 2048) * 2, 512, 512, 2048), False)),
        (12, (12, 6, 768, 2048, (512, 512, 512, 2048) * 3, True)),
        (13, (13, 7, 896, 2048, (512, 512, 512, 2048) * 3 + (2048,), True)),
    ],
)
def test_shape_of_a_depth(depth: int, shape: tuple[object, ...]) -> None:
    c = recipe.model_config(depth, 100)
    assert (c.n_layer, c.n_head, c.n_embd, c.sequence_len, windows(c), c.backout) == shape
    assert c.n_kv_head == c.n_head
    assert not recipe.model_config(depth, 100, preset="classic").backout


@pytest.mark.parametrize(("length", "short"), [(1, 128), (512, 128), (513, 256), (2048, 512)])
def test_short_window_is_a_quarter(length: int, short: int) -> None:
    c = ModelConfig.modern(vocab_size=8, n_layer=2, n_head=1, n_kv_head=1, n_embd=8,
                           sequence_len=length, window_pattern="S")  # fmt: skip
    assert windows(c) == (short, length)


def test_parameters_and_flops_by_hand() -> None:
    shape = {"vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    c = ModelConfig.modern(**shape, sequence_len=300, window_pattern="SLL")
    p = count_parameters(c)
    # Vocabulary padded to 128; tables in layers 0 and 2; gates of 12 channels and 2 heads; two
    # scalars a layer, the smear's 24 + 1, backout's one.
    assert (p.embedding, p.head, p.value_embedding) == (128 * 32, 128 * 32, 2 * 128 * 16)
    assert p.matrices == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 * 32) + 2 * 12 * 2
    assert p.scalars == 3 * 2 + 25 + 1
    assert p.total == 2 * 4096 + 4096 + p.matrices + 32
    assert recipe.training_tokens(c) == 12 * (p.matrices + 4096)
    # 6 a parameter, 12 a channel of each of the tokens that a token sees: 128 + 300 + 300.
    assert flops_per_token(c) == 6 * (p.matrices + 4096) + 12 * 32 * 728


def test_given_sizes_overrule_the_rules() -> None:
    c = recipe.model_config(2, 100)
    plan = recipe.base_plan(c, tokens=10_000, batch=2_048, micro_batch_size=2, workers=2, seed=5)
    assert (plan.train.steps, plan.train.global_batch_size, plan.tokens) == (5, 4, 10_240)
    assert (plan.train.micro_batch_size, plan.train.seed, plan.train.precision) == (2, 5, "bf16")
    sft = recipe.sft_config(c, 64, epochs=2.5, batch=4_096, micro_batch_size=4, workers=2)
    assert (sft.steps, sft.global_batch_size, sft.micro_batch_size) == (20, 8, 4)
    assert recipe.sft_config(c, 64, epochs=0.01, batch=4_096).steps == 1
    tiny = recipe.base_plan(c, tokens=1, workers=9).train
    assert (tiny.global_batch_size, tiny.steps) == (9, 1)


@pytest.mark.parametrize(
    ("rows", "workers", "most", "micro"),
    [(12, 1, 8, 6), (12, 2, 8, 6), (12, 4, 8, 3), (7, 1, 6, 1), (7, 2, 9, 1), (8, 1, 0, 1)],
)
def test_largest_micro_batch(rows: int, workers: int, most: int, micro: int) -> None:
    assert recipe.largest_micro(rows, workers, most) == micro


def test_scaled_learning_rates() -> None:
    one = OptimConfig(matrix_lr=1, embedding_lr=2, unembedding_lr=3, scalar_lr=4, weight_decay=0.5)
    half = one.with_scaled_lr(0.5)
    rates = (half.matrix_lr, half.embedding_lr, half.unembedding_lr, half.scalar_lr)
    assert rates == (0.5, 1, 1.5, 2)
    assert half.weight_decay == 0.5


@pytest.mark.parametrize(
    ("millions", "cpu", "gpu"),
    [
        # Up to 2^14 on a CPU. On a GPU 2^17 where an epoch has 200 steps of that, the base run's
        # rule where it gives more (2^18 from 270 M tokens on), and never less than on a CPU.
        (1, 2**12, 2**12),
        (8, 2**14, 2**15),
        (100, 2**14, 2**17),
        (500, 2**14, 2**18),
    ],
)
def test_sft_batches_fill_a_gpu(millions: int, cpu: int, gpu: int) -> None:
    tokens = millions * 10**6
    assert recipe.sft_batch_tokens(tokens, on_gpu=False) == cpu
    assert recipe.sft_batch_tokens(tokens, on_gpu=True) == gpu


def test_reinforcement_learning_recipe() -> None:
    """A tenth of the rates of the fine-tuning before, which is assumed where it is unknown."""
    model = recipe.model_config(4, 300)
    optim = OptimConfig(
        matrix_lr=1, embedding_lr=2, unembedding_lr=3, scalar_lr=4, weight_decay=0.5, momentum=0.9
    )
    train = recipe.rl_config(model, optim, steps=50, rollouts=96)
    rates = list(train.optim.learning_rates().values())
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    o = train.optim
    assert (o.weight_decay, o.momentum) == (0, 0.9)
    assert (o.warmup_ratio, o.warmdown_ratio, o.final_lr_frac) == (0.02, 0.6, 0.1)
    assert (train.stage, train.steps, train.precision) == ("rl", 50, "fp32")
    # 96 answers in micro-batches of at most 32; validated and saved four times.
    assert (train.global_batch_size, train.micro_batch_size) == (96, 32)
    assert (train.eval_every, train.save_every) == (13, 13)
    assert recipe.rl_config(model, optim, steps=1, rollouts=50).micro_batch_size == 25
    other = recipe.rl_config(model, None, steps=1, rollouts=50, micro_batch_size=10)
    assert other.micro_batch_size == 10
    sft = recipe.sft_config(model, 1000).optim
    assert other.optim.matrix_lr == pytest.approx(0.1 * sft.matrix_lr)
