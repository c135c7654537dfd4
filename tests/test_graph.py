"""Walking a graph: order, reach, slices, and which operators are products and lookups."""

import numpy as np
from graphs import GraphBuilder

from extraction.graph import Wiring
from extraction.schema import read


def make(tmp_path, builder, inputs, outputs) -> Wiring:
    path = tmp_path / "graph.tflite"
    path.write_bytes(builder.finish(inputs, outputs))
    return Wiring(read(path))


def test_reach_slices_and_sources(tmp_path):
    b = GraphBuilder()
    x, y, unused = b.tensor(), b.tensor(), b.tensor()
    folded = b.op("MUL", [2.0], [3.0])
    left = b.op("ADD", x, folded)
    right = b.op("NEG", y)
    both = b.op("MUL", left, right)
    wiring = make(tmp_path, b, [x, y, unused], [both, right])
    assert not wiring.dynamic(folded) and wiring.dynamic(left)
    assert wiring.reached_by(both) == (x, y) and wiring.reached_by(right) == (y,)
    assert unused not in wiring.consumed
    assert [op.outputs[0] for op in wiring.slice([both], ())] == [left, right, both]
    assert [op.outputs[0] for op in wiring.slice([both], (), constants=True)] == [folded, left, right, both]
    assert [op.outputs[0] for op in wiring.slice([both], {left})] == [right, both]
    assert wiring.sources([left])[both] == {left, y}


def test_products_are_found_in_every_spelling(tmp_path):
    b = GraphBuilder()
    x, w = b.tensor((1, 2, 3)), np.ones((4, 3), np.float32)
    full = b.op("FULLY_CONNECTED", x, w, -1, shape=(1, 2, 4), KeepNumDims=True)
    plain = b.op("BATCH_MATMUL", x, w.T.copy(), shape=(1, 2, 4))
    turned = b.op("BATCH_MATMUL", x, w, shape=(1, 2, 4), AdjY=True)
    quantised = b.constant(np.ones((4, 3)), "i1", scale=[0.5])
    through = b.op("FULLY_CONNECTED", x, b.op("DEQUANTIZE", quantised, shape=(4, 3)), -1, shape=(2, 4))
    dynamic = b.op("BATCH_MATMUL", plain, b.op("TRANSPOSE", full, [0, 2, 1], shape=(1, 4, 2)), shape=(1, 2, 2))
    wiring = make(tmp_path, b, [x], [full, plain, turned, through, dynamic])
    found = {linear.output: linear for linear in wiring.linears()}
    assert set(found) == {full, plain, turned, through}
    assert {linear.channels for linear in found.values()} == {4}
    assert [found[i].transposed for i in (full, plain, turned, through)] == [False, True, False, False]


def test_lookups_are_told_apart_by_their_indices(tmp_path):
    b = GraphBuilder()
    ids, table = b.tensor((1, 2), "INT32"), b.constant(np.eye(3))
    gathered = b.op("GATHER", table, ids, shape=(1, 2, 3))
    looked_up = b.op("EMBEDDING_LOOKUP", b.op("RESHAPE", ids, [2], shape=(2,), kind="INT32"), table, shape=(2, 3))
    constant = b.op("GATHER", table, [1, 1], shape=(2, 3))
    wiring = make(tmp_path, b, [ids], [gathered, looked_up, constant])
    assert [lookup.output for lookup in wiring.lookups()] == [gathered, looked_up]
    assert [lookup.output for lookup in wiring.lookups(dynamic=False)] == [constant]
