"""Compressors without parameters, against loops over tokens in plain Python."""

import pytest
import torch
import torch.nn.functional as F

import laco_kernels as lk

WIDTH, HEADS = 12, 3
EXACT = {"rtol": 0, "atol": 1e-12}


def inputs(num_patches=16, prefix=1, batch=2):
    torch.manual_seed(0)
    x = torch.randn(batch, prefix + num_patches, WIDTH, dtype=torch.float64)
    keys = torch.randn(batch, prefix + num_patches, HEADS, WIDTH // HEADS, dtype=torch.float64)
    query = torch.randn(batch, HEADS, WIDTH // HEADS, dtype=torch.float64)
    return x, keys, query


def cosine(one, other):
    return float(F.cosine_similarity(one, other, dim=0))


def tome_round(tokens, metric, sizes, surplus):
    """One round of bipartite matching on lists of one image."""
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    pairs = []
    for a in even:
        best = max(odd, key=lambda b: cosine(metric[a], metric[b]))
        pairs.append((cosine(metric[a], metric[best]), a, best))
    groups = {i: [i] for i in range(len(tokens))}
    for _, a, b in sorted(pairs, reverse=True)[:surplus]:
        groups[b] += groups.pop(a)
    merged = [], [], []
    for members in groups.values():
        total = sum(sizes[i] for i in members)
        for out, values in zip(merged, (tokens, metric), strict=False):
            out.append(sum(values[i] * sizes[i] for i in members) / total)
        merged[2].append(total)
    return merged


@pytest.mark.parametrize(("num_patches", "budget"), [(16, 15), (16, 8), (16, 4), (15, 4), (9, 1), (8, 8)])
def test_tome_merges_the_pairs_most_alike(num_patches, budget):
    x, keys, _ = inputs(num_patches)
    module = lk.nn.build_compressor("tome", in_dim=WIDTH, num_tokens=budget, prefix_tokens=1)
    out, sizes = module.merge_all(x, keys)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(sizes[:, 0], torch.ones(2, dtype=x.dtype))
    for i in range(2):
        tokens, metric, counts = list(x[i, 1:]), list(keys[i, 1:].mean(1)), [1.0] * num_patches
        while len(tokens) > budget:
            tokens, metric, counts = tome_round(tokens, metric, counts, min(len(tokens) - budget, len(tokens) // 2))
        torch.testing.assert_close(out[i, 1:], torch.stack(tokens), **EXACT)
        assert sizes[i, 1:].tolist() == counts
    assert sizes.sum() == x.shape[0] * x.shape[1]
    plain, grid = module(x, None, keys=keys)
    assert grid is None
    assert torch.equal(plain, out)


def test_tome_weighs_tokens_by_the_patches_they_stand_for():
    x, keys, _ = inputs()
    first = lk.nn.build_compressor("tome", in_dim=WIDTH, num_tokens=8)
    second = lk.nn.build_compressor("tome", in_dim=WIDTH, num_tokens=1)
    x, keys = x[:, 1:], keys[:, 1:]
    out, sizes = first.merge_all(x, keys)
    alone, all_of_them = second.merge_all(out, keys[:, :8], sizes)
    assert all_of_them.flatten().tolist() == [16, 16]
    torch.testing.assert_close(alone[:, 0], x.mean(1), **EXACT)


def scores_by_hand(keys, query):
    if query is None:
        return [float(sum((head**2).sum() for head in key)) for key in keys]
    rows = [torch.stack([key[h] @ query[h] for key in keys]) / (WIDTH // HEADS) ** 0.5 for h in range(HEADS)]
    return [float(w) for w in sum(row.exp() / row.exp().sum() for row in rows) / HEADS]


@pytest.mark.parametrize("by_class_token", [True, False])
@pytest.mark.parametrize(
    ("options", "dominant", "contextual"), [({}, 3, 1), ({"contextual": 0}, 4, 0), ({"num_tokens": 13}, 11, 2)]
)
def test_visionzip_keeps_dominant_tokens_and_averages_the_others(by_class_token, options, dominant, contextual):
    x, keys, query = inputs()
    query = query if by_class_token else None
    module = lk.nn.build_compressor("visionzip", in_dim=WIDTH, prefix_tokens=1, **options)
    out, grid = module(x, (4, 4), keys=keys, query=query)
    assert grid is None
    assert out.shape[1] == dominant + contextual == module.num_output_tokens((4, 4))
    for i in range(2):
        patches, own = x[i, 1:], keys[i, 1:]
        scores = scores_by_hand(own, None if query is None else query[i])
        best = sorted(sorted(range(16), key=lambda t: -scores[t])[:dominant])
        expected = [patches[t] for t in best]
        rest = [t for t in range(16) if t not in best]
        targets = [rest[len(rest) * j // contextual] for j in range(contextual)]
        groups = {t: [t] for t in targets}
        metric = own.mean(1)
        for t in sorted({*rest} - {*targets}) if contextual else ():
            groups[max(targets, key=lambda target: cosine(metric[t], metric[target]))].append(t)
        expected += [torch.stack([patches[t] for t in members]).mean(0) for members in groups.values()]
        torch.testing.assert_close(out[i], torch.stack(expected), **EXACT)


@pytest.mark.parametrize("by_class_token", [True, False])
@pytest.mark.parametrize(("budget", "neighbours"), [(4, 3), (5, 0), (7, 99), (1, 2)])
def test_prumerge_plus_merges_pruned_tokens_into_their_neighbours(by_class_token, budget, neighbours):
    x, keys, query = inputs()
    query = query if by_class_token else None
    module = lk.nn.build_compressor(
        "prumerge_plus", in_dim=WIDTH, prefix_tokens=1, num_tokens=budget, neighbours=neighbours, place="inside"
    )
    out, _ = module(x, (4, 4), keys=keys, query=query)
    assert torch.equal(out[:, :1], x[:, :1])
    for i in range(2):
        patches, own = x[i, 1:], keys[i, 1:]
        scores, metric = scores_by_hand(own, None if query is None else query[i]), own.mean(1)
        best = sorted(range(16), key=lambda t: -scores[t])[: (budget + 1) // 2]
        rest = [t for t in range(16) if t not in best]
        kept = sorted(best + [rest[len(rest) * j // (budget // 2)] for j in range(budget // 2)])
        pruned = [t for t in range(16) if t not in kept]
        for place, t in enumerate(kept):
            near = sorted(pruned, key=lambda p: -cosine(metric[t], metric[p]))[:neighbours]
            total = sum(scores[p] for p in [t, *near])
            expected = sum(scores[p] * patches[p] for p in [t, *near]) / total
            torch.testing.assert_close(out[i, 1 + place], expected, **EXACT)


@pytest.mark.parametrize("name", ["tome", "visionzip", "prumerge_plus"])
def test_all_tokens_pass_where_the_budget_is_all(name):
    x, keys, query = inputs()
    module = lk.nn.build_compressor(name, in_dim=WIDTH, prefix_tokens=1, num_tokens=16, place="behind")
    assert torch.equal(module(x, (4, 4), keys=keys, query=query)[0], x[:, 1:])


@pytest.mark.parametrize("name", ["tome", "visionzip", "prumerge_plus"])
def test_gradients_reach_every_token(name):
    x, keys, query = inputs(num_patches=36)
    module = lk.nn.build_compressor(name, in_dim=WIDTH, prefix_tokens=1, place="inside")
    x.requires_grad_()
    module(x, (6, 6), keys=keys, query=query)[0].sum().backward()
    assert (x.grad.abs().sum(2) > 0).all()
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("tome", {"residual": True}, ValueError, "residual: got True"),
        ("tome", {"out_dim": 3}, ValueError, "out_dim: got 3, expected 12"),
        ("tome", {"proportional": 1}, TypeError, "proportional: got 1"),
        ("tome", {"num_tokens": 0}, ValueError, "num_tokens: got 0"),
        ("visionzip", {"num_tokens": 4, "contextual": 5}, ValueError, "contextual: got 5, expected at most num_tokens = 4"),
        ("visionzip", {"scores": "all"}, ValueError, "scores: got 'all', expected one of 'auto', 'cls', 'key_norm'"),
        ("prumerge_plus", {"place": "before"}, ValueError, "place: got 'before', expected 'behind' or 'inside'"),
    ],
)
def test_refusals_at_construction(name, options, error, message):
    with pytest.raises(error, match=message):
        lk.nn.build_compressor(name, in_dim=WIDTH, **options)


def test_refusals_at_a_call():
    x, keys, query = inputs()
    module = lk.nn.build_compressor("visionzip", in_dim=WIDTH, prefix_tokens=1, num_tokens=17)
    with pytest.raises(ValueError, match="num_tokens: got 17, expected at most 16, the patches that come"):
        module(x, (4, 4), keys=keys)
    with pytest.raises(ValueError, match="num_tokens: got 17"):
        module.num_output_tokens((4, 4))
    module = lk.nn.build_compressor("visionzip", in_dim=WIDTH, prefix_tokens=1, scores="cls")
    with pytest.raises(ValueError, match="query: got None, expected the class token's query"):
        module(x, (4, 4), keys=keys)
    with pytest.raises(ValueError, match=r"keys: got \[2, 16, 3, 4\], expected \[2, 17, heads, head_dim\]"):
        module(x, (4, 4), keys=keys[:, 1:], query=query)
    with pytest.raises(ValueError, match=r"query: got \[2, 4\], expected \[2, 3, 4\]"):
        module(x, (4, 4), keys=keys, query=query[:, 0])
    with pytest.raises(ValueError, match="x: got 17 tokens, expected 26"):
        module(x, (5, 5), keys=keys, query=query)


@pytest.mark.parametrize("name", ["tome", "visionzip", "prumerge_plus"])
@pytest.mark.parametrize("how", ["float16", "bfloat16", "autocast"])
def test_sums_of_many_large_tokens_stay_means(name, how):
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    x = torch.full((1, 900, 8), 150.0) + torch.randn(1, 900, 8)
    keys = torch.randn(1, 900, 4, 16) * 3
    options = {"tome": {}, "visionzip": {"contextual": 1}, "prumerge_plus": {"neighbours": 99}}[name]
    module = lk.nn.build_compressor(name, in_dim=8, num_tokens=2, **options)
    exact, _ = module(x.to(dtype).double(), None, keys=keys.to(dtype).double())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y, _ = module(x.to(dtype), None, keys=keys.to(dtype))
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()


def test_sizes_are_counted_exactly_in_any_precision():
    x, keys = torch.randn(2, 1024, 8, dtype=torch.bfloat16), torch.randn(2, 1024, 2, 4, dtype=torch.bfloat16)
    module = lk.nn.build_compressor("tome", in_dim=8, num_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        _, sizes = module.merge_all(x, keys)
    assert sizes.sum(1).tolist() == [1024, 1024]
    with pytest.raises(ValueError, match=r"sizes: got \[2, 9\], expected \[2, 1024\], one number a token"):
        module.merge_all(x, keys, torch.ones(2, 9))


def test_tokens_without_any_score_stay_themselves():
    x = torch.randn(1, 16, 8)
    module = lk.nn.build_compressor("prumerge_plus", in_dim=8, scores="key_norm")
    y, _ = module(x, (4, 4), keys=torch.zeros(1, 16, 2, 4))
    assert all((x[0] == token).all(1).any() for token in y[0])
