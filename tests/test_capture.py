"""What capture records against what the models' own projections give, however the model is run."""

import copy
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bertops
import capture_ddp
import small_models
from bertops.models import BertConfig, BertForMaskedLM, BertModel
from bertops.models.checkpoint import source_names
from errors import FP32_RELATIVE_NORM
from test_transformers import FAMILIES, LENGTH, LENGTHS, VOCABULARY, batch, every_family

transformers = pytest.importorskip("transformers", minversion="5.1")
importlib.import_module("bertops.integrations.transformers")

HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
spied = []


def spy(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Plain attention under transformers' own 4-D mask, the local window in it, that keeps what it sees."""
    scores = query @ key.transpose(2, 3) * scaling + (0 if attention_mask is None else attention_mask)
    spied.append(SimpleNamespace(q=query, k=key, v=value, lse=scores.logsumexp(-1), scale=scaling))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("spy", spy)
transformers.AttentionMaskInterface.register(
    "spy", importlib.import_module("transformers.masking_utils").eager_mask
)


def hf_model(family, head="", **changes):
    config_class, options = FAMILIES[family]
    auto = getattr(transformers, f"AutoModel{head}")
    torch.manual_seed(1)
    config = config_class(**{**options, **changes})
    return auto.from_config(config, attn_implementation="bertops").eval()


def our_model(cls=BertModel, **changes):
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    options = {**sizes, "intermediate_size": 40, "initializer_range": 0.4, "max_position_embeddings": LENGTH}
    return cls(BertConfig(**{**options, **changes})).eval()


def assert_same(name, actual, expected):
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= FP32_RELATIVE_NORM, f"{name}: relative error norm {error:.2e}"


def assert_tap(tap, expected, real):
    """At real rows: padded ones attend in transformers and are 0 here."""
    for name in ("q", "k", "v", "lse"):
        actual, wanted = (rows(getattr(x, name), real) for x in (tap, expected))
        assert_same(f"{name} of layer {tap.layer}", actual, wanted)
    assert tap.scale == pytest.approx(expected.scale)


def rows(x, real):
    return x.transpose(1, 2)[real]


def some_loss(taps, real):
    """A loss that reaches all of q, k, v and lse."""
    total = 0.0
    for tap in taps:
        q, k, v, lse = (rows(x, real) for x in (tap.q, tap.k, tap.v, tap.lse))
        total = total + (q.sin() * k).sum() + v.square().sum() + lse.cos().sum()
    return total


def gradients(model):
    """A missing one is 0: compiled graphs give zeros to what a loss does not reach."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def expected_of(model, inputs, real, layers=(1, -1)):
    """Loss and gradients of a plain run."""
    with bertops.capture(model, layers) as taps:
        model(**inputs)
    loss = some_loss(taps, real)
    loss.backward()
    result = loss.detach(), gradients(model)
    assert result[1].any()
    model.zero_grad()
    return result


def assert_step(model, loss, expected):
    loss.backward()
    assert_same("loss", loss.detach(), expected[0])
    assert_same("gradients", gradients(model), expected[1])
    model.zero_grad()


def state(model):
    """Everything that a capture could leave behind."""
    return [
        (name, sorted(vars(module)), list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@every_family
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_taps_of_transformers_are_what_its_attention_gets(family, padding):
    model = hf_model(family)
    inputs, real = batch(padding)
    with bertops.capture(model, layers=[3, 1, -2]) as taps:
        model(**inputs)
    some_loss(taps, real).backward()
    ours = gradients(model)
    model.set_attn_implementation("spy")
    model.zero_grad()
    spied.clear()
    model(**inputs)
    some_loss([spied[2], spied[0], spied[1]], real).backward()
    assert_same("gradients", ours, gradients(model))
    assert len(spied) == 3 and taps.layers == (3, 1, -2) and [tap.layer for tap in taps] == [3, 1, 2]
    for number, asked in ((1, 1), (2, -2), (3, 3)):
        assert taps[asked].layer == number
        assert_tap(taps[asked], spied[number - 1], real)
        assert torch.equal(taps[asked].mask.bool(), real) and taps[asked].cu_seqlens is None
        assert taps[asked].window == (4 if family == "modernbert" and number > 1 else None)
        assert taps[asked].lse.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
@every_family
def test_taps_under_a_head_of_transformers(family, head):
    model = hf_model(family, head)
    inputs, real = batch()
    with bertops.capture(model, layers=[2]) as taps:
        model(**inputs)
    with bertops.capture(model.base_model, layers=[2]) as direct:
        model.base_model(**inputs)
    for name in ("q", "k", "v", "lse"):
        assert torch.equal(rows(getattr(taps[2], name), real), rows(getattr(direct[2], name), real))
    some_loss(taps, real).backward()
    assert gradients(model).any()


@pytest.mark.parametrize(
    ("groups", "inner", "order"),
    [(1, 1, [0, 0, 0, 0]), (2, 1, [0, 0, 1, 1]), (3, 1, [0, 0, 1, 2]), (2, 2, [0, 1, 0, 1, 2, 3, 2, 3])],
)
def test_shared_layers_count_every_time_they_run(groups, inner, order):
    model = hf_model("albert", num_hidden_layers=4, num_hidden_groups=groups, inner_group_num=inner)
    attentions = [m for m in model.modules() if type(m).__name__ == "AlbertAttention"]
    called = []
    for module in attentions:
        module.register_forward_pre_hook(lambda module, inputs: called.append(attentions.index(module)))
    inputs, real = batch()
    count = len(order)
    for layers in (range(1, count + 1), [count, 2]):
        called.clear()
        with bertops.capture(model, layers) as taps:
            model(**inputs)
        assert called == order
        model.set_attn_implementation("spy")
        spied.clear()
        model(**inputs)
        model.set_attn_implementation("bertops")
        for layer in layers:
            assert_tap(taps[layer], spied[layer - 1], real)
    with pytest.raises(ValueError, match=f"from 1 to {count} or from -{count} to -1, got {count + 1}"):
        bertops.capture(model, [count + 1]).__enter__()


@pytest.mark.parametrize("padding", small_models.PADDINGS)
@pytest.mark.parametrize("head", small_models.HEADS)
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_taps_of_our_models_equal_those_of_transformers(family, head, padding, tmp_path):
    theirs, ours = small_models.both(family, tmp_path, head)
    ids, mask = small_models.batch(family, padding)
    with bertops.capture(ours, layers=[1, -1]) as taps:
        ours(ids, mask)
    theirs.set_attn_implementation("spy")
    spied.clear()
    theirs(ids, attention_mask=mask.long())
    for asked, number in ((1, 1), (-1, 3)):
        assert_tap(taps[asked], spied[number - 1], mask)
        assert torch.equal(taps[asked].mask, mask) and taps[asked].window is None
    some_loss(taps, mask).backward()
    some_loss([spied[0], spied[2]], mask).backward()
    embeddings = (ours.encoder if head else ours).embeddings, theirs.base_model.embeddings
    assert_same("gradient", embeddings[0].word.weight.grad, embeddings[1].word_embeddings.weight.grad)


def test_packed_projections_are_read_in_place():
    model = our_model()
    projected = []
    model.layers[2].attention.qkv.register_forward_hook(lambda _, __, out: projected.append(out))
    with bertops.capture(model) as taps:
        model(**ours(batch()[0]))
    memory = projected[0].untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == memory for x in (taps[-1].q, taps[-1].k, taps[-1].v))


def ours(inputs):
    return {"input_ids": inputs["input_ids"], "mask": inputs["attention_mask"].bool()}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_nothing_is_computed_or_copied_for_a_tap(kind, maps):
    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs, _ = batch()
    model = our_model() if kind == "ours" else hf_model("bert")
    inputs = ours(inputs) if kind == "ours" else inputs
    options = {"output_scores" if kind == "ours" else "output_attentions": maps}
    model(**inputs, **options)  # transformers makes buffers in the first call
    with Operators() as plain:
        model(**inputs, **options)
    with bertops.capture(model, [1, 2, 3]) as taps, Operators() as captured:
        model(**inputs, **options)
    assert captured.names == plain.names
    assert len(taps) == 3 and all(tap.lse.isfinite().any() for tap in taps)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_unpadded_and_packed_taps_hold_the_real_rows(cls):
    model = our_model(cls)
    inputs, real = batch("holes")
    inputs = ours(inputs)
    offsets = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.arange(LENGTH).expand(real.shape)[real][None]
    with bertops.capture(model, [2, -1]) as taps:
        model(**inputs)
        padded = list(taps)
        model(**inputs, unpad=True)
        unpadded = list(taps)
        model(inputs["input_ids"][real][None], position_ids=positions, cu_seqlens=offsets)
        packed = list(taps)
    for wanted, *others in zip(padded, unpadded, packed, strict=True):
        for tap in others:
            assert tap.mask is None and torch.equal(tap.cu_seqlens, offsets)
            assert tap.layer == wanted.layer
            for name in ("q", "k", "v", "lse"):
                assert_same(name, getattr(tap, name)[0].transpose(0, 1), rows(getattr(wanted, name), real))
    some_loss(unpadded, torch.ones(1, offsets[-1], dtype=torch.bool)).backward()
    packed_gradients = gradients(model)
    model.zero_grad()
    some_loss(padded, real).backward()
    assert_same("gradients", packed_gradients, gradients(model))


def test_packed_rows_of_transformers():
    model = hf_model("bert")
    inputs, real = batch()
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad(), bertops.capture(model) as taps:
        model(**inputs)
        padded = taps[-1]
        model(inputs["input_ids"][real][None], position_ids=positions, cu_seq_lens_q=offsets)
    assert torch.equal(taps[-1].cu_seqlens, offsets) and taps[-1].mask is None
    assert_same("lse", taps[-1].lse[0].transpose(0, 1), rows(padded.lse, real))


@pytest.mark.parametrize("kind", ["ours", "ours, unpadded", "transformers", "albert"])
def test_stop_ends_the_forward_behind_the_last_layer(kind):
    """The taps and their gradients are those of a whole forward, and nothing runs that they do not need."""
    own = kind.startswith("ours")
    model = our_model() if own else hf_model("bert" if kind == "transformers" else "albert")
    inputs, real = batch()
    inputs = ours(inputs) if own else inputs
    if kind == "ours, unpadded":
        inputs["unpad"], real = True, torch.ones(1, int(real.sum()), dtype=torch.bool)
    for layers in ([1], [2, 1], [-1]):
        model.zero_grad()
        with bertops.capture(model, layers) as taps:
            model(**inputs)
        some_loss(taps, real).backward()
        expected = gradients(model)
        model.zero_grad()
        names = vars(model).keys()
        with bertops.capture(model, layers, stop=True) as stopped:
            model(**inputs)
            pytest.fail("the forward came to its end")
        some_loss(stopped, real).backward()
        assert_same("gradients", gradients(model), expected)
        assert vars(model).keys() == names and not model._forward_pre_hooks
        for tap, whole in zip(stopped, taps, strict=True):
            assert tap.layer == whole.layer and torch.equal(tap.lse, whole.lse)


def test_stop_of_one_model_ends_no_block_of_another():
    student, teacher = our_model(), our_model()
    inputs = ours(batch()[0])
    with bertops.capture(student) as taps_s:
        with bertops.capture(teacher, [2], stop=True) as taps_t, torch.no_grad():
            teacher(**inputs)
        assert torch.is_grad_enabled()
        student(**inputs)
    assert taps_s[-1].q.requires_grad and not taps_t[2].q.requires_grad
    with bertops.capture(student, stop=True) as taps_s:
        with bertops.capture(student, [1]) as inner:
            student(**inputs)
        pytest.fail("the block of another capture ended the stop")
    assert taps_s[-1].layer == 3 and inner[1].layer == 1


def test_stop_before_the_layer_recorded_nothing():
    model = our_model()
    with bertops.capture(model) as later, bertops.capture(model, [1], stop=True):
        model(**ours(batch()[0]))
    with pytest.raises(RuntimeError, match="layer -1 recorded nothing"):
        later[-1]


def test_a_batch_without_padding_is_not_packed():
    model = our_model()
    inputs = ours(batch()[0])
    inputs["mask"] = torch.ones_like(inputs["mask"])
    with bertops.capture(model) as taps:
        expected = model(**inputs).last_hidden_state
        actual = model(**inputs, unpad=True).last_hidden_state
    assert taps[-1].cu_seqlens is None and taps[-1].mask is None
    assert_same("hidden", actual, expected)


def test_each_forward_replaces_the_last_and_frees_it():
    model = our_model()
    first, second = ours(batch(seed=1)[0]), ours(batch(seed=2)[0])
    with torch.no_grad():
        with bertops.capture(model) as taps:
            model(**first)
            one = taps[-1]
            model(**second)
            two = taps[-1]
            assert taps[-1].q is two.q and not torch.equal(one.q, two.q)
        assert taps[-1].q is two.q
        model(**first)
    assert taps[-1].q is two.q, "recorded after the block"


@pytest.mark.parametrize("kind", ["ours", "transformers", "albert"])
def test_unread_taps_raise(kind):
    model = our_model() if kind == "ours" else hf_model("bert" if kind == "transformers" else "albert")
    inputs, _ = batch()
    inputs = ours(inputs) if kind == "ours" else inputs
    with bertops.capture(model, [1, -1]) as taps:
        with pytest.raises(RuntimeError, match="layer -1 recorded nothing: the model's forward"):
            taps[-1]
        with pytest.raises(KeyError, match=r"layer 2 was not asked for: .*layers=\[1, -1\]"):
            taps[2]
        model(**inputs)
        broken = (
            model.layers[1]
            if kind == "ours"
            else model.base_model.encoder.layer[1]
            if kind == "transformers"
            else model.encoder.albert_layer_groups[0].albert_layers[0].ffn
        )
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        with pytest.raises(RuntimeError, match="layer -1 recorded nothing"):
            taps[-1]
        handle.remove()
        model(**inputs)
        again = taps[-1]
    with bertops.capture(model, [-1]) as fresh:
        model(**inputs)
    assert torch.equal(again.q, fresh[-1].q) and again.layer == fresh[-1].layer == 3


def test_layers_that_run_outside_of_the_models_forward_raise():
    model = our_model()
    inputs = ours(batch()[0])
    with bertops.capture(model, [1]) as taps:
        model(**inputs)
        model.layers[0](torch.randn(4, LENGTH, 32), inputs["mask"], None, False)
        with pytest.raises(RuntimeError, match="layer 1 ran 2 times instead of 1"):
            taps[1]
        model(**inputs)
        assert taps[1].q.shape == (4, 4, LENGTH, 8)


def test_switching_the_attention_inside_the_block_raises():
    model = hf_model("bert")
    inputs, _ = batch()
    with bertops.capture(model) as taps:
        model(**inputs)
        model.set_attn_implementation("sdpa")
        model(**inputs)
        with pytest.raises(RuntimeError, match="attn_implementation='bertops'"):
            taps[-1]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0], ValueError, r"layers must not hold 0.*hidden_states\[0\] is the embedding"),
        ([1, 4], ValueError, "layers must be from 1 to 3 or from -3 to -1, got 4"),
        ([-4], ValueError, "layers must be from 1 to 3 or from -3 to -1, got -4"),
        ([], ValueError, "layers must not be empty"),
        (3, TypeError, "layers must be a list of integers, got 3"),
        ("12", TypeError, "layers must be a list of integers, got '12'"),
        ([1.0], TypeError, "layers must be integers, got 1.0"),
        ([True], TypeError, "layers must be integers, got True"),
    ],
)
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_layers_that_do_not_exist(kind, layers, error, message):
    model = our_model() if kind == "ours" else hf_model("bert")
    before = state(model)
    with pytest.raises(error, match=message), bertops.capture(model, layers):
        pass
    assert state(model) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_says_what_to_do(implementation):
    model = hf_model("bert")
    model.set_attn_implementation(implementation)
    message = (
        rf"attn_implementation='{implementation}', which.*import bertops\.integrations\.transformers.*"
        r"model\.set_attn_implementation\('bertops'\)"
    )
    with pytest.raises(ValueError, match=message), bertops.capture(model):
        pass


def test_models_that_cannot_be_captured():
    pair = torch.nn.ModuleDict({"student": our_model(), "teacher": hf_model("bert")})
    for model, error, message in (
        (torch.nn.Linear(2, 2), TypeError, "model must be one of bertops.models or of transformers.*Linear"),
        (lambda x: x, TypeError, "model must be a torch.nn.Module, got function"),
        (pair, ValueError, "2 encoders .BertModel at 'student', BertModel at 'teacher'.: capture one"),
        (hf_model("bert").encoder, TypeError, "got BertEncoder"),
        (hf_model("bert", is_decoder=True, add_cross_attention=True), ValueError, "3 layers and 6 attention"),
    ):
        with pytest.raises(error, match=message), bertops.capture(model):
            pass
    with bertops.capture(torch.nn.Sequential(pair["student"])) as taps:
        pair["student"](**ours(batch()[0]))
    assert taps[-1].layer == 3


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_nothing_stays_behind(kind):
    model = our_model(BertForMaskedLM) if kind == "ours" else hf_model("albert", "ForMaskedLM")
    before = state(model)
    with bertops.capture(model, [1, -1]):
        assert state(model) != before
        with bertops.capture(model, [2]):
            pass
        with pytest.raises(TypeError, match="while it is captured"):
            copy.deepcopy(model)
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), bertops.capture(model, [1, -1]), bertops.capture(model, [1]):
        raise ZeroDivisionError
    assert state(model) == before
    copy.deepcopy(model)


def test_layers_asked_for_twice_come_twice():
    """A map may send two student layers to one teacher layer: zip over both taps must not stop short."""
    model = our_model()
    with torch.no_grad(), bertops.capture(model, iter([2, 2, -2, -1])) as taps:
        model(**ours(batch()[0]))
    assert len(taps) == 4 and taps.layers == (2, 2, -2, -1) and [tap.layer for tap in taps] == [2, 2, 2, 3]
    assert len({tap.q for tap in taps}) == 2


def test_nested_captures_of_one_model_and_of_two():
    student, teacher = our_model(), hf_model("albert")
    inputs, real = batch()
    with bertops.capture(student, [1, 2]) as outer, bertops.capture(teacher, [2]) as t:
        with bertops.capture(student, [2, 3]) as inner, torch.no_grad():
            student(**ours(inputs))
        with torch.no_grad():
            teacher(**inputs)
        student(**ours(inputs))
    assert inner[2].q is not outer[2].q and torch.equal(inner[2].q, outer[2].q)
    assert outer[2].q.requires_grad and not inner[2].q.requires_grad and not t[2].q.requires_grad
    some_loss(outer, real).backward()
    assert gradients(student).any() and not gradients(teacher).any()


def test_teacher_and_student_may_be_one_model():
    model = our_model()
    inputs, _ = batch()
    with bertops.capture(model, [-1]) as s, bertops.capture(model, [1, -1]) as t:
        model(**ours(inputs))
    assert s[-1].q is t[-1].q and t[1].layer == 1


@pytest.mark.parametrize("kind", ["ours", "albert"])
def test_threads_keep_apart(kind):
    model = our_model() if kind == "ours" else hf_model("albert")
    batches = [batch(seed=seed)[0] for seed in range(3)]
    if kind == "ours":
        batches = [ours(inputs) for inputs in batches]
    expected = []
    for inputs in batches:
        with torch.no_grad(), bertops.capture(model, [2]) as taps:
            model(**inputs)
        expected.append(taps[2].q)
    before = state(model)
    barrier = threading.Barrier(3)

    def work(index):
        barrier.wait()
        for _ in range(10):
            with torch.no_grad():
                if index == 2:
                    model(**batches[index])
                    continue
                with bertops.capture(model, [2]) as taps:
                    model(**batches[index])
                    assert torch.equal(taps[2].q, expected[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert state(model) == before


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_run_in_another_thread_is_not_recorded():
    model = our_model()
    inputs = ours(batch()[0])
    with bertops.capture(model) as taps:
        in_a_thread(lambda: model(**inputs))
        with pytest.raises(RuntimeError, match="in the thread that entered the block"):
            taps[-1]


def small(kind):
    """A model of two layers, the second of ModernBERT being local, its inputs and the real tokens."""
    inputs, real = batch()
    if kind == "ours":
        return our_model(num_hidden_layers=2), ours(inputs), real
    return hf_model(kind, num_hidden_layers=2), inputs, real


class Graphs:
    """A backend that counts what it compiles."""

    def __init__(self, backend="aot_eager"):
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend(backend)

    def compile(self, function, **options):
        return torch.compile(function, backend=self.counter, **options)

    @property
    def count(self):
        return self.counter.frame_count


def kinds(*names):
    return pytest.mark.parametrize("kind", names)


@kinds("albert", "modernbert")
def test_model_compiled_and_run_before_the_block(kind):
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    graphs = Graphs()
    compiled = graphs.compile(model, fullgraph=True)
    compiled(**inputs)
    for _ in range(3):
        with bertops.capture(compiled, [1, -1]) as taps:
            compiled(**inputs)
        assert_step(model, some_loss(taps, real), expected)
    assert graphs.count == 2


def test_every_run_of_a_compiled_model_records_or_does_not():
    model, inputs, real = small("ours")
    expected = expected_of(model, inputs, real)
    graphs = Graphs()
    compiled = graphs.compile(model, fullgraph=True)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    compiled(**inputs)
    assert graphs.count == 1
    for _ in range(3):
        with bertops.capture(model, [1, -1]) as taps:
            compiled(**other)
            first = taps[1]
            compiled(**inputs)
            assert not torch.equal(taps[1].q, first.q)
            kept = taps[1].q.clone()
            in_a_thread(lambda: compiled(**other))
            assert torch.equal(taps[1].q, kept)
        assert_step(model, some_loss(taps, real), expected)
        compiled(**other)
        assert torch.equal(taps[1].q, kept)
    assert graphs.count == 3, "a graph without taps, one with, and one of the other thread"
    memory = {x.untyped_storage().data_ptr() for x in (taps[1].q, taps[1].k, taps[1].v)}
    assert len(memory) == 1, "the views of the projection were copied"
    with torch.no_grad(), bertops.capture(model, [1]) as taps:
        compiled(**inputs)
    assert torch.equal(taps[1].q, kept) and not taps[1].q.requires_grad


@kinds("ours")
def test_taps_read_inside_a_compiled_function(kind):
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)

    def step(taps):
        model(**inputs)
        return some_loss([taps[1], taps[-1]], real)

    graphs = Graphs()
    compiled = graphs.compile(step, fullgraph=True)
    for _ in range(3):
        with bertops.capture(model, [1, -1]) as taps:
            assert_step(model, compiled(taps), expected)
    assert graphs.count == 1


@kinds("ours")
def test_block_inside_a_compiled_function(kind):
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    before = state(model)

    def step():
        with bertops.capture(model, [1, -1]) as taps:
            model(**inputs)
        return some_loss(taps, real)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        Graphs("eager").compile(step, fullgraph=True)()
    assert state(model) == before
    graphs = Graphs("eager")
    compiled = graphs.compile(step)
    for _ in range(3):
        assert_step(model, compiled(), expected)
        assert state(model) == before
    assert graphs.count >= 1


def layers_of(model, kind):
    if kind == "ours":
        return list(model.layers)
    return list(model.encoder.albert_layer_groups) if kind == "albert" else list(model.layers)


@kinds("ours", "albert")
def test_layers_compiled_one_by_one(kind):
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    Graphs("eager")
    for layer in layers_of(model, kind):
        layer.compile(backend="eager")
    model(**inputs)
    for _ in range(3):
        with bertops.capture(model, [1, -1]) as taps:
            model(**inputs)
        assert_step(model, some_loss(taps, real), expected)


@kinds("ours")
def test_graph_breaks_lose_nothing(kind):
    """Then the model's forward is compiled in pieces, of which some were made before the block."""
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    for layer in layers_of(model, kind):
        layer.register_forward_hook(lambda *_: torch._dynamo.graph_break())

    def run():
        return model(**inputs)

    graphs = Graphs("eager")
    compiled = graphs.compile(run)
    compiled()
    for _ in range(3):
        with bertops.capture(model, [1, -1]) as taps:
            compiled()
        assert_step(model, some_loss(taps, real), expected)
    assert graphs.count > 2


def checkpoint_layers(model, kind, **options):
    for layer in layers_of(model, kind):
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, **options, **kwargs
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "where", "compiled"),
    [
        ("ours", "layers", False),
        ("ours", "layers", True),
        ("ours", "model", False),
        ("ours", "model", True),
        ("albert", "layers", False),
        ("albert", "model", False),
        ("bert", "enable", False),
    ],
)
def test_checkpoints(kind, where, compiled):
    """Recomputation leaves the taps as they are, with the gradients of a plain run."""
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    run = model
    if where == "enable":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    elif where == "layers":
        checkpoint_layers(model, kind, use_reentrant=False)
    if compiled:
        run = Graphs().compile(model)
        run(**inputs)
    for _ in range(2):
        with bertops.capture(model, [1, -1]) as taps:
            if where == "model":
                checkpoint(run, *inputs.values(), use_reentrant=False)
            else:
                run(**inputs)
            kept = taps[1]
            assert_step(model, some_loss(taps, real), expected)
            if where == "model" and compiled:
                with pytest.raises(RuntimeError, match="before backward"):
                    taps[1]
            else:
                assert taps[1].q is kept.q and taps[1].lse is kept.lse


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@kinds("ours", "albert", "bert")
@pytest.mark.parametrize("after", [False, True], ids=["backward inside", "backward after"])
def test_stop_with_checkpoints(kind, after):
    """Recomputation goes through a recorded layer without being stopped there."""
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real, [1])
    if kind == "bert":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    else:
        checkpoint_layers(model, kind, use_reentrant=False)
    for _ in range(2):
        with bertops.capture(model, [1], stop=True) as taps:
            model(**inputs)
            pytest.fail("the forward came to its end")
        loss = some_loss(taps, real)
        if after:
            assert_step(model, loss, expected)
        else:
            with bertops.capture(model, [1], stop=True):
                assert_step(model, loss, expected)


@kinds("ours", "albert")
def test_checkpoints_of_compiled_layers(kind):
    model, inputs, real = small(kind)
    expected = expected_of(model, inputs, real)
    Graphs()
    for layer in layers_of(model, kind):
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    checkpoint_layers(model, kind, use_reentrant=False)
    for _ in range(2):
        with bertops.capture(model, [1, -1]) as taps:
            model(**inputs)
            loss = some_loss(taps, real)
            assert_step(model, loss, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpoints_raise():
    """They run the layers without gradients: the student would not learn, without a word."""
    model = hf_model("bert").train()
    inputs, _ = batch()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with bertops.capture(model), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**inputs)
    with torch.no_grad(), bertops.capture(model) as taps:
        model(**inputs)
    assert taps[-1].layer == 3


def test_autocast():
    model = our_model()
    with torch.autocast("cpu", dtype=torch.bfloat16), bertops.capture(model) as taps:
        model(**ours(batch()[0]))
    assert taps[-1].q.dtype == torch.bfloat16 and taps[-1].lse.dtype == torch.float32


def eager_minilm(student, teacher, inputs, real):
    """MiniLM's loss as it is usually written: maps of output_attentions, values of the projections' hooks."""
    maps, relations = [], []
    for model in (student, teacher):
        value = model.encoder.layer[-1].attention.self.value
        projected = []
        handle = value.register_forward_hook(lambda _, __, out, to=projected: to.append(out))
        maps.append(model(**inputs, output_attentions=True).attentions[-1])
        handle.remove()
        v = projected[0].unflatten(-1, (4, -1)).transpose(1, 2)
        scores = v @ v.transpose(2, 3) / v.shape[3] ** 0.5
        relations.append(scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1))
    total = 0.0
    for ours, theirs in (maps, relations):
        logs = ours.clamp_min(torch.finfo(ours.dtype).tiny).log()
        kl = (theirs.xlogy(theirs) - theirs * logs).sum(-1)
        total = total + rows(kl, real).mean()
    return total


@pytest.mark.parametrize("kind", ["ours", "ours unpadded", "transformers"])
def test_minilm_through_taps_is_the_eager_one(kind, tmp_path):
    """Value and the student's gradients; teacher and student have unlike widths."""
    inputs, real = batch("holes", pad_token_id=0)
    teacher = hf_model("bert", hidden_size=48).requires_grad_(False)
    student = hf_model("bert", num_hidden_layers=2)
    for model, folder in ((teacher, tmp_path / "teacher"), (student, tmp_path / "student")):
        model.save_pretrained(folder)
        model.set_attn_implementation("eager")
    expected = eager_minilm(student, teacher, inputs, real)
    expected.backward()
    expected_gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    if kind == "transformers":
        student.zero_grad()
        for model in (teacher, student):
            model.set_attn_implementation("bertops")
    else:
        teacher, student = (BertModel.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
        inputs = {**ours(inputs), "unpad": kind == "ours unpadded"}
        names = {name: source_names(name, student.config) for name, _ in student.named_parameters()}
        expected_gradients = {
            name: torch.cat([expected_gradients[source] for source in sources])
            for name, sources in names.items()
            if sources[0] in expected_gradients
        }
    with torch.no_grad(), bertops.capture(teacher) as taps:
        teacher(**inputs)
    t = taps[-1]
    with bertops.capture(student) as taps:
        student(**inputs)
    s = taps[-1]
    lse, scales = {"lse_s": s.lse, "lse_t": t.lse}, {"scale_s": s.scale, "scale_t": t.scale}
    loss = bertops.attention_kl(s.q, s.k, t.q, t.k, s.mask, cu_seqlens=s.cu_seqlens, **lse, **scales)
    loss = loss + bertops.relation_kl(s.v, t.v, s.mask, cu_seqlens=s.cu_seqlens)
    loss.backward()

    assert_same("loss", loss.detach(), expected.detach())
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected_gradients.keys() and len(found) > 15
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        error = (found[name] - gradient).norm()
        assert error <= FP32_RELATIVE_NORM * gradient.norm() + torch.finfo(torch.float32).eps * whole, name


def test_gradients_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(capture_ddp.run, (str(tmp_path),), nprocs=capture_ddp.PROCESSES)
    found = torch.load(tmp_path / "gradients")
    modules = {
        "inside": (capture_ddp.Distiller(), capture_ddp.loss_inside),
        "outside": (capture_ddp.model(24, seed=1), capture_ddp.loss_outside),
    }
    for (name, step), distributed in found.items():
        module, loss = modules[name]
        module.zero_grad()
        loss(module, *capture_ddp.batch(step)).backward()
        alone = capture_ddp.gradients(module)
        assert alone.keys() <= distributed.keys() and len(alone) > 10
        for key, expected in alone.items():
            torch.testing.assert_close(
                distributed[key], expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
            )
