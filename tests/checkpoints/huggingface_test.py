"""Parity with Hugging Face transformers: logits, gradients, weights there and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.checkpoints.huggingface import config_from_hf, from_hf_state_dict, to_hf_state_dict
from lcl.models import Decoder, DecoderConfig, LinearRope, Llama3Rope, Rope, init_params
from lcl.objectives import NextToken

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e .[dev]")
transformers = pytest.importorskip("transformers", reason="as above: pip install -e .[dev]")

VOCAB = 89
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
MODELS = {
    "llama-gqa-untied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "llama-mha-tied": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-all-biases": (
        "Llama",
        dict(num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    ),
    "llama3-rope": (
        "Llama",
        dict(num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    ),
    "qwen2-biases": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3-qk-norm": (
        "Qwen3",
        # head_dim is not D / N, as in the released models
        dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=16),
    ),
}


@dataclasses.dataclass
class Pair:
    """The same random weights on both sides; ours with a padded vocabulary."""

    theirs: object
    config: DecoderConfig
    params: dict

    def state_dict(self) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in self.theirs.state_dict().items()}


def make_pair(name: str, vocab_size: int = VOCAB) -> Pair:
    family, options = MODELS[name]
    hf_config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(hf_config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Far from the usual start: norms are not ones, biases not zeros, logits not flat.
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    config = config_from_hf(hf_config.to_dict(), vocab_size=vocab_size, dtype="float32")
    state_dict = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return Pair(theirs, config, from_hf_state_dict(config, state_dict))


@pytest.fixture(scope="module", params=MODELS)
def pair(request) -> Pair:
    return make_pair(request.param)


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length), dtype=np.int32)


def test_logits_and_gradients_equal_hugging_face(pair):
    tokens = random_tokens(2, 24)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    their_logits = pair.theirs(torch.from_numpy(inputs).long()).logits
    their_loss = torch.nn.functional.cross_entropy(
        their_logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()
    )
    pair.theirs.zero_grad()
    their_loss.backward()
    model = Decoder(pair.config)

    @jax.jit
    def ours(params):
        def loss_fn(params):
            logits = model.apply({"params": params}, inputs)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
            return nll.mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return loss, logits, gradients

    loss, logits, gradients = ours(pair.params)
    assert their_logits.std().item() > 0.5, "logits too flat to tell anything"
    np.testing.assert_allclose(logits, their_logits.detach().numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)

    our_gradients = to_hf_state_dict(pair.config, gradients)
    their_gradients = {n: p.grad.numpy() for n, p in pair.theirs.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        size = np.abs(gradient).max()
        if name.endswith("k_proj.bias"):  # softmax does not see a constant added to all keys ...
            size = max(size, 1e-3)  # ... but for RoPE, so this gradient is small
        assert size > 0, name
        np.testing.assert_allclose(
            our_gradients[name], gradient, atol=1e-4 * size, rtol=0, err_msg=name
        )


def test_weights_return_bit_for_bit(pair):
    theirs = pair.state_dict()
    if pair.config.tie_embeddings:
        theirs.pop("lm_head.weight")
    returned = to_hf_state_dict(pair.config, pair.params)
    assert returned.keys() == theirs.keys()
    for name, array in theirs.items():
        assert returned[name].dtype == np.float32
        assert returned[name].shape == array.shape, name
        np.testing.assert_array_equal(returned[name], array, err_msg=name)


def test_our_tree_is_the_one_that_the_model_makes(pair):
    made = jax.eval_shape(lambda key: init_params(pair.config, key), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, pair.params)


@pytest.mark.parametrize("name", ["llama-gqa-untied", "llama-mha-tied"])
def test_a_padded_vocabulary_returns_bit_for_bit_and_leaves_the_logits(name):
    pair = make_pair(name, vocab_size=128)
    tokens = random_tokens(1, 8)
    logits = Decoder(pair.config).apply({"params": pair.params}, tokens)
    theirs = pair.theirs(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(logits[..., :VOCAB], theirs, atol=1e-4, rtol=0)
    returned = to_hf_state_dict(pair.config, pair.params, vocab_size=VOCAB)
    for key, array in pair.state_dict().items():
        if key in returned:
            np.testing.assert_array_equal(returned[key], array, err_msg=key)
    assert returned["model.embed_tokens.weight"].shape == (VOCAB, 32)


@pytest.mark.parametrize("name", ["llama-gqa-untied", "qwen3-qk-norm"])
def test_packed_documents_equal_hugging_face_one_document_at_a_time(name):
    pair = make_pair(name)
    lengths = (5, 11, 7)
    documents = [random_tokens(1, n)[0] + i for i, n in enumerate(lengths)]
    documents = [d % VOCAB for d in documents]
    padding = 3
    tokens = np.concatenate([*documents, np.zeros(padding, np.int32)])[None].astype(np.int32)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [[0] * padding])
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
    logits = Decoder(pair.config).apply(
        {"params": pair.params},
        tokens,
        positions[None].astype(np.int32),
        segments[None].astype(np.int32),
    )
    assert np.isfinite(logits).all()
    start = 0
    for document in documents:
        theirs = pair.theirs(torch.from_numpy(document)[None].long()).logits.detach().numpy()
        ours = logits[:, start : start + len(document)]
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
        start += len(document)


def test_the_training_loss_equals_hugging_face_s_own():
    """Through the objective that trains, packed rows and weights included."""
    from lcl.data.batch import Batch

    pair = make_pair("llama-gqa-untied")
    tokens = random_tokens(2, 17)
    shape = (2, 16)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), shape),
        loss_weights=np.ones(shape, np.float32),
        source_ids=np.zeros(shape, np.int32),
    )
    loss, _ = NextToken()(Decoder(pair.config), pair.params, batch, 2)
    labels = torch.from_numpy(tokens).long()
    theirs = pair.theirs(labels, labels=labels).loss.item()
    np.testing.assert_allclose(loss, theirs, rtol=1e-5)


def test_config_from_hf_reads_both_rope_forms():
    base = dict(
        model_type="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    old = config_from_hf({**base, "rope_theta": 5e5})
    new = config_from_hf({**base, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert old.rope == new.rope == Rope(theta=5e5)
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert config_from_hf({**base, **linear}).rope == LinearRope(theta=10_000.0, factor=4.0)
    scaled = config_from_hf({**base, "rope_parameters": LLAMA3_ROPE}).rope
    assert scaled == Llama3Rope(theta=10_000.0, factor=4.0, original_context_length=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(changes, message):
    base = dict(
        model_type="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match=message):
        config_from_hf({**base, **changes})


class TestWrongTensors:
    @pytest.fixture(scope="class")
    def case(self):
        return make_pair("llama-mha-tied")

    def test_missing(self, case):
        state = case.state_dict()
        del state["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(ValueError, match="no tensor 'model.layers.1.mlp.up_proj.weight'"):
            from_hf_state_dict(case.config, state)

    def test_unknown(self, case):
        state = {**case.state_dict(), "model.layers.0.self_attn.q_proj.bias": np.zeros(32)}
        with pytest.raises(ValueError, match="no place for tensor 'model.layers.0.self_attn.q"):
            from_hf_state_dict(case.config, state)

    def test_a_deeper_checkpoint_is_not_cut_off(self, case):
        shallow = dataclasses.replace(case.config, num_layers=2)
        with pytest.raises(ValueError, match="no place for tensor 'model.layers.2"):
            from_hf_state_dict(shallow, case.state_dict())

    def test_another_shape(self, case):
        state = {**case.state_dict(), "model.norm.weight": np.ones(31)}
        with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(31,\)"):
            from_hf_state_dict(case.config, state)

    def test_a_vocabulary_that_does_not_fit(self, case):
        small = dataclasses.replace(case.config, vocab_size=64)
        with pytest.raises(ValueError, match="89 tokens and DecoderConfig.vocab_size = 64"):
            from_hf_state_dict(small, case.state_dict())
        with pytest.raises(ValueError, match="vocab_size = 90 must be in 1..89"):
            to_hf_state_dict(case.config, case.params, vocab_size=90)

    def test_a_head_that_is_not_tied(self, case):
        state = case.state_dict()
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        with pytest.raises(ValueError, match="is not tied"):
            from_hf_state_dict(case.config, state)

    def test_an_old_buffer_is_ignored(self, case):
        state = {
            **case.state_dict(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),
        }
        from_hf_state_dict(case.config, state)
