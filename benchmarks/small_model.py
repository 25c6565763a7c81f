"""The model that step benchmarks time: the shape of a 5M-parameter chat model, with random weights."""

from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 4096
PAD, EOS = 0, 1


def make_model(*, tied: bool) -> Qwen2ForCausalLM:
    """Weights as torch's random state has them; `tied` embeddings make it a 4M-parameter model."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        initializer_range=0.06,  # at the usual .02 attention is nearly uniform and a wrong one would not show
    )
    return Qwen2ForCausalLM(config)
