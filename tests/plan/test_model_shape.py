import pytest
from peft import LoraConfig, get_peft_model

from sdft_ds.plan.model_shape import load_shape, shape_of
from tests.helpers import tiny


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_counts_what_it_has(tied):
    model = tiny.llama(tie_word_embeddings=tied)
    shape = shape_of(model)
    assert shape.parameters == sum(param.numel() for param in model.parameters())
    assert shape.tied == tied and shape.head == model.lm_head.weight.numel()
    assert (shape.query, shape.key_value, shape.heads) == (32, 16, model.config.num_attention_heads)
    layer = sum(param.numel() for param in model.model.layers[0].parameters())
    assert shape.layer == pytest.approx(layer, rel=0.01)  # the last norm belongs to none


@pytest.mark.parametrize("file", ["", "config.json"])
def test_a_configuration_is_enough(tmp_path, file):
    tiny.llama().config.save_pretrained(tmp_path)
    assert load_shape(str(tmp_path / file)) == shape_of(tiny.llama())


@pytest.mark.parametrize("name, billions", [("7b", 6.74), ("32b", 32.76), ("70b", 70.55), ("405b", 405.85)])
def test_the_built_in_models_are_as_large_as_their_names(name, billions):
    assert load_shape(name).parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("targets", [None, ["all-linear"], ["q_proj", "down_proj"]])
def test_an_adapter_is_counted_as_peft_makes_it(targets):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear" if len(targets or [0]) == 1 else targets
    )
    model = get_peft_model(tiny.llama(), config)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert shape_of(tiny.llama()).adapter_parameters(4, targets) == trained


def test_an_unknown_layer_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="no layer is called wq|no linear layer is called wq; there are down_proj"):
        shape_of(tiny.llama()).adapter_parameters(4, ["wq"])


def test_an_unknown_model_is_one_line():
    with pytest.raises(ValueError, match="no/such/model is neither 7b") as error:
        load_shape("no/such/model")
    assert "\n" not in str(error.value)
