"""What step benchmarks time, with random weights: the shapes of a 5M-parameter chat model and of larger ones."""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 4096
PAD, EOS = 0, 1


def make_shape(name: str) -> PreTrainedModel:
    """`5M`; `135M`, as SmolLM2-135M is; `1.5B`, as Qwen2.5-1.5B is."""
    if name == "5M":
        return make_model(tied=True)
    common = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "pad_token_id": PAD, "eos_token_id": EOS}
    if name == "135M":
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, **common))
    assert name == "1.5B", name
    sizes = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=12, num_key_value_heads=2, **common))


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
