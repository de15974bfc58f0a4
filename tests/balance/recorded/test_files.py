"""Files: written and read again, folders in their order, what is missing asked for."""

import json

import numpy as np
import pytest

from balance.recorded.files import read_fingerprints, read_npz, write_npz
from balance.recorded.routes import join
from tests.balance.recorded.recordings import draw_ids


def fingerprint(ids_TLK, category):
    return {
        "dataset": "quiz",
        "category": category,
        "router_data": [
            {
                f"token_{195 + t}": {
                    f"layer_{layer}": {"selected_experts": ids.tolist(), "selected_probs": [0.5]}
                    for layer, ids in enumerate(row)
                }
            }
            for t, row in enumerate(ids_TLK)
        ],
    }


def test_fingerprint_folder(tmp_path):
    ids_TLK = draw_ids(12, 11, 4, 32)  # tokens 195..206 and layers 0..10 do not sort as text
    (tmp_path / "a").mkdir()
    for name in ("False", "True"):
        text = json.dumps(fingerprint(ids_TLK, name))
        (tmp_path / "a" / f"{name}_examples.json").write_text(text)
    (tmp_path / "a" / "True.json").write_text("{}")
    routes = read_fingerprints(tmp_path)
    assert routes.domain_S.tolist() == ["quiz/False", "quiz/True"]
    np.testing.assert_array_equal(routes.ids_TLK, np.concatenate([ids_TLK, ids_TLK]))


def test_plain_npz_round_trip(tmp_path):
    routes = join(
        [draw_ids(4, 2, 2, 300), draw_ids(3, 2, 2, 300)],
        300,
        num_tokens_S=[5, 3],
        domain_S=["a", "b"],
    )
    write_npz(tmp_path / "routes.npz", routes)
    again = read_npz(tmp_path / "routes.npz")
    for name in ("ids_TLK", "sequence_start", "domain_S", "row_mask_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(routes, name))
    assert again.num_experts == 300
    np.testing.assert_array_equal(
        again.pack(2, 3, "domain").loads(), routes.pack(2, 3, "domain").loads()
    )


def test_plain_npz_without_experts_needs_them(tmp_path):
    np.savez(tmp_path / "x.npz", ids_TLK=draw_ids(4, 2, 2, 8))
    with pytest.raises(ValueError, match="num_experts must be given"):
        read_npz(tmp_path / "x.npz")
    assert read_npz(tmp_path / "x.npz", num_experts=8).sequence_start.tolist() == [0, 4]
