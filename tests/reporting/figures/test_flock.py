"""Figures of the flock: how many blocks have moved."""

import pathlib

from PIL import Image

from nashswarm.reporting.figures import flock

DYNAMICS = {
    "places": [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
    "links": [[0, 1], [0, 2]],
    "watched": 0,
    "neighbours": [1, 2],
    "frames": [
        {"offsets": [0, 0, 0], "bits": [3.0, 3.0, 2.0]},
        {"offsets": [0, 1, 0], "bits": [3.0, 2.75, 2.0]},
        {"offsets": [-1, 1, 0], "bits": [3.25, 2.75, 2.0]},
    ],
}


def test_flock_frames_show_how_many_blocks_moved(tmp_path: pathlib.Path) -> None:
    titles = [axes.get_title() for axes in flock.still(DYNAMICS).axes if axes.get_title()]
    assert titles == ["before: 0 of 3 moved", "during: 1 of 3 moved", "after: 2 of 3 moved"]
    flock.animate(DYNAMICS, tmp_path / "flock.gif")
    with Image.open(tmp_path / "flock.gif") as film:
        assert film.n_frames >= len(DYNAMICS["frames"])
