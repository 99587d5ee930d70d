"""A cache keeps a plan for each set of options and each format: unlike layers take turns."""

from __future__ import annotations

import torch

from kvquant import CacheFormat, plan
from modelled import assert_same, make, rows


def test_layers_whose_options_differ_keep_their_plans():
    cache, twin = (make("contiguous", dtype=torch.float32) for _ in range(2))
    options = [{"sliding_window": 5}, {"softcap": 20.0}]
    for step in range(6):
        for layer, extra in enumerate(options):
            query, (key, value) = torch.randn(3, 1, 4, 32), rows(3, 1)
            got = cache.attend(layer, query, key, value, **extra)
            twin.append(layer, key, value)
            view, seqs = twin.layer(layer)
            wanted = plan(query, view, seqs, **extra).run(query, view, seqs)
            assert torch.equal(got, wanted)
        if step == 1:
            kept = dict(cache._known)
    assert cache._known == kept
    assert len({id(x) for x in kept.values()}) == len(options)
    assert_same(cache, twin)


def test_layers_whose_formats_differ_keep_their_plans():
    formats = [CacheFormat(), CacheFormat(value="int4")]
    cache, twin = (make("contiguous", dtype=torch.float32, format=formats) for _ in range(2))
    for step in range(4):
        for layer in range(2):
            query, (key, value) = torch.randn(3, 1, 4, 32), rows(3, 1)
            got = cache.attend(layer, query, key, value)
            twin.append(layer, key, value)
            view, seqs = twin.layer(layer)
            assert torch.equal(got, plan(query, view, seqs).run(query, view, seqs))
        if step == 1:
            kept = dict(cache._known)
    assert cache._known == kept
    assert len({id(x) for x in kept.values()}) == len(formats)
    assert_same(cache, twin)
