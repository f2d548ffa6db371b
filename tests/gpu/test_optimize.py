"""`hf.optimize` on a GPU: full-size encoders inside the promise, and CUDA graphs that replay what was asked for."""

import copy
import gc
import threading

import pytest
import torch

import laco_kernels as lk
from laco_kernels import testing
from tests.hf.encoders import STOCK, compressed, pixels, stock
from tests.hf.full_size import REAL, beyond_the_promise, errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
families = pytest.mark.parametrize("family", list(STOCK))


def small(family, kind="compressed", dtype=torch.float32):
    encoder = stock(family, dtype=dtype).cuda()
    return compressed(encoder, layer=2) if kind == "compressed" else encoder


def images(batch=2, seed=0, side=4, dtype=torch.float32):
    return (pixels(side, batch, torch.float64) * (seed + 1)).to("cuda", dtype)


def features(model, x, **options):
    with torch.no_grad():
        return model(x, **options).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_encoder_errs_no_more_than_eager(name):
    torch.use_deterministic_algorithms(False)  # cuDNN's attention warns that it is not
    found, restored = errors(name, "cuda", torch.bfloat16, "triton")
    assert not beyond_the_promise(found, torch.bfloat16)
    assert restored


@families
def test_a_graph_computes_what_the_encoder_does(family):
    model = small(family)
    eager = {seed: features(model, images(seed=seed)) for seed in range(3)}
    lk.hf.optimize(model, fuse=False, graphs=True)
    kept = [features(model, images(seed=seed)) for seed in (0, 1, 2, 0)]
    for seed, output in zip((0, 1, 2, 0), kept, strict=True):
        assert torch.equal(output, eager[seed])
    assert len(model.forward.graphs) == 1
    with torch.no_grad():
        states = model(images(seed=1), output_hidden_states=True)
        again = model(images(seed=2), output_hidden_states=True)
    assert len(states.hidden_states) == 5
    assert torch.equal(again.last_hidden_state, eager[2])
    lk.hf.restore(model)
    with torch.no_grad():
        expected = model(images(seed=1), output_hidden_states=True)
    for ours, theirs in zip(states.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


def test_new_shapes_are_captured_where_there_is_room():
    model = small("clip")
    expected = {batch: features(model, images(batch)) for batch in (1, 2, 3)}
    lk.hf.optimize(model, fuse=False, graphs=True)
    for batch in (1, 2, 3, 1):
        assert torch.equal(features(model, images(batch)), expected[batch])
    assert len(model.forward.graphs) == 3
    lk.hf.optimize(model, fuse=False, graphs=True, max_bytes=0)
    with pytest.warns(UserWarning, match="no room for"):
        assert torch.equal(features(model, images(1)), expected[1])
    for batch in (1, 2, 3, 1):
        assert torch.equal(features(model, images(batch)), expected[batch])
    assert not model.forward.graphs


def test_batches_are_padded_to_sizes_asked_for():
    model = small("aimv2")
    expected = {batch: features(model, images(batch)) for batch in (1, 3, 4, 6)}
    lk.hf.optimize(model, fuse=False, graphs=True, batch_sizes=(4, 2))
    for batch in (3, 1, 4, 6, 3):
        torch.testing.assert_close(features(model, images(batch)), expected[batch], rtol=1e-4, atol=1e-4)
    assert [key[0] for key in model.forward.graphs] == [2, 6, 4] or sorted(k[0] for k in model.forward.graphs) == [2, 4, 6]


def test_new_weights_are_seen():
    model, x = small("siglip"), images()
    lk.hf.optimize(model, graphs=True, fuse=False)
    before = features(model, x)
    with torch.no_grad():
        model.encoder.layers[3].mlp.fc2.bias.add_(1)  # in place: the same memory
    changed = features(model, x)
    assert not torch.equal(changed, before)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        model.encoder.layers[3].mlp.fc2.bias.sub_(1)
    torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
    model.double()
    model.float()
    gc.collect()
    torch.cuda.empty_cache()
    torch.testing.assert_close(features(model, x), before, rtol=1e-4, atol=1e-4)
    model.half()
    assert features(model, x.half()).dtype == torch.float16


def test_hooks_gradients_and_training_run_the_encoder_itself():
    model, x = small("internvl"), images()
    lk.hf.optimize(model, graphs=True, fuse=False)
    features(model, x)
    seen = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    features(model, x)
    assert seen
    handle.remove()
    features(model, x)
    assert len(seen) == 1
    assert model(x).last_hidden_state.requires_grad
    model.train()
    assert model(x).last_hidden_state.requires_grad
    assert features(model, x).shape == (2, 5, 32)


def test_streams_and_threads_wait_for_each_other():
    model = small("aimv2")
    expected = [features(model, images(seed=seed)) for seed in range(4)]
    lk.hf.optimize(model, graphs=True, fuse=False)
    wrong = []

    def work(seed):
        x = images(seed=seed)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(50):
                if not torch.equal(features(model, x), expected[seed]):
                    wrong.append(seed)

    features(model, images())
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_has_graphs_of_its_own():
    model, x = small("siglip"), images()
    with torch.autocast("cuda", torch.bfloat16):
        low = features(model, x)
    full = features(model, x)
    lk.hf.optimize(model, graphs=True, fuse=False)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(features(model, x), low)
        assert torch.equal(features(model, x), full)
    with torch.inference_mode():
        assert torch.equal(model(x).last_hidden_state, full)
    assert len(model.forward.graphs) == 3


def test_restore_gives_the_memory_back():
    model, x = small("clip"), images(64)

    def reserved():
        torch.cuda.synchronize()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # which cuBLAS keeps for every stream
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    features(model, x)
    before = reserved()
    lk.hf.optimize(model, graphs=True, fuse=False)
    features(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(features(twin, x), features(model, x))
    assert torch.cuda.memory_reserved() > before
    lk.hf.restore(twin)
    lk.hf.restore(model)
    del twin
    assert reserved() <= before


def test_without_copies_the_next_call_overwrites():
    model = small("clip")
    first_alone, second_alone = features(model, images()), features(model, images(seed=1))
    lk.hf.optimize(model, graphs=True, fuse=False, clone=False)
    first = features(model, images())
    assert torch.equal(first, first_alone)
    second = features(model, images(seed=1))
    assert torch.equal(second, second_alone)
    assert second.data_ptr() == first.data_ptr()


@families
def test_fused_and_captured_with_adapters_of_autocast(family):
    model, x = small(family), images()
    truth = features(small(family, dtype=torch.float64), images(dtype=torch.float64))
    with torch.autocast("cuda", torch.bfloat16):
        eager = features(model, x)
        lk.hf.optimize(model, graphs=True, impl="triton")
        ours = [features(model, x) for _ in range(2)]
    assert torch.equal(*ours)
    assert ours[0].dtype == eager.dtype
    assert testing.compare(ours[0], eager, truth, [])[2]


def test_compiled_and_captured():
    model, x = small("clip"), images()
    expected = features(model, x)
    lk.hf.optimize(model, graphs=True, compile=True, fuse=False)
    for _ in range(2):
        torch.testing.assert_close(features(model, x), expected, rtol=1e-4, atol=1e-4)
    assert len(model.forward.graphs) == 1
