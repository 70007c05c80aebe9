"""Data larger than memory: what is read is what was written, each once, and memory does not grow on the way."""

import io
import os
import pickle
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from pyrovae import GaussianMixture, LinearGaussian, evaluate, fit
from pyrovae.batches import as_data, count, stream
from pyrovae.data import Blocks, OnDisk, in_epochs, load
from pyrovae.schedules import Linear

# --- files -------------------------------------------------------------------------------


def saved(path, array):
    np.save(path, array)
    return path


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(
    "array",
    [
        normal(7, 3).astype(np.float32),
        normal(7, 3),
        normal(7, 3).astype(">f4"),
        normal(7, 3, 2),
        normal(7, 3) > 0,
        np.arange(7 * 12, dtype=np.uint8).reshape(7, 3, 2, 2),
    ],
    ids=lambda array: f"{array.dtype}-{array.ndim}",
)
def test_rows_are_the_flat_floats_of_the_array(tmp_path, array):
    data = OnDisk(saved(tmp_path / "x.npy", array))
    whole = torch.from_numpy(array.reshape(7, -1).astype(np.float32)) / (255 if array.dtype == np.uint8 else 1)
    assert len(data) == 7
    assert torch.equal(data[:]["x"], whole)
    assert torch.equal(data[[5, 0, 5]]["x"], whole[[5, 0, 5]])
    assert torch.equal(data[-1]["x"], whole[-1])
    assert torch.equal(torch.stack([row["x"] for row in data.__getitems__([6, 2])]), whole[[6, 2]])
    assert data[3:3]["x"].shape == (0, whole.shape[1])
    with pytest.raises(IndexError):
        data[[7]]


def test_bytes_are_read_as_load_reads_them(tmp_path):
    path = saved(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8))
    splits = load(path)
    together = torch.cat([splits.train["x"], splits.val["x"], splits.test["x"]])
    found = OnDisk(path)[:]["x"]
    assert torch.equal(
        found[(found @ torch.arange(16.0)).argsort()], together[(together @ torch.arange(16.0)).argsort()]
    )


def test_several_files_are_read_row_by_row(tmp_path):
    x, y = normal(6, 2, 2).astype(np.float32), np.arange(6, dtype=np.uint8)
    files = {"x": saved(tmp_path / "x.npy", x), "y": str(saved(tmp_path / "y.npy", y))}
    (batch,) = DataLoader(OnDisk(files), batch_size=10)
    assert torch.equal(batch["x"], torch.from_numpy(x).flatten(1))
    assert (batch["y"].tolist(), batch["y"].dtype) == (y.tolist(), torch.int64)  # labels, and no shades of grey
    row = OnDisk(files)[3]
    assert (row["x"].shape, row["y"].item()) == ((4,), 3)


def test_sequences_keep_their_steps(tmp_path):
    x, lengths = normal(5, 4, 3).astype(np.float32), np.array([4, 1, 2, 4, 3])
    files = {"x": saved(tmp_path / "x.npy", x), "lengths": saved(tmp_path / "n.npy", lengths)}
    batch = next(stream(DataLoader(OnDisk(files), batch_size=5)))
    assert torch.equal(batch["lengths"], torch.from_numpy(lengths))
    mask = torch.arange(4) < batch["lengths"].unsqueeze(1)
    assert torch.equal(batch["x"], torch.from_numpy(x) * mask.unsqueeze(2))


def test_minibatches_are_those_of_tensors(tmp_path):
    x = normal(50, 3).astype(np.float32)
    found, expected = (
        [batch["x"] for batch in stream(DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(1)))]
        for data in (OnDisk(saved(tmp_path / "x.npy", x)), TensorDataset(torch.from_numpy(x)))
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_worker_reads_for_itself(tmp_path):
    x = normal(1000, 4).astype(np.float32)
    data = OnDisk({"x": saved(tmp_path / "x.npy", x)})
    assert len(pickle.dumps(data)) < 1000
    loader = DataLoader(data, 500, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([batch["x"] for batch in loader]), torch.from_numpy(x))


def archive():
    file = io.BytesIO()
    np.savez(file, x=np.zeros((3, 2)))
    return file.getvalue()


def written(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


BAD = {
    "empty": (b"", "magic string"),
    "text": (b"1,2,3\n4,5,6\n", "magic string"),
    "a pickle": (pickle.dumps([1, 2]), "magic string"),
    "objects": (written(np.array([{}, {}])), "objects"),
    "an archive": (archive(), "magic string"),
    "one number": (written(np.float32(3)), "it holds no array"),
    "whole numbers": (written(np.zeros((3, 2), int)), "Expected an array of floats.*got int64"),
    "complex": (written(np.zeros((3, 2), complex)), "got complex128"),
    "strings": (written(np.array(["a", "b"])), "got <U1"),
    "cut in its header": (written(np.zeros((3, 2)))[:40], "header"),
    "cut in its values": (written(np.zeros((3, 2)))[:-8], "greater than file size"),
    "no rows": (written(np.zeros((0, 2))), "of at least one row"),
    "no values": (written(np.zeros((2, 0))), "of at least one row"),
    "Fortran's order": (written(np.asfortranarray(np.zeros((3, 2)))), "ascontiguousarray"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_data_are_refused(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"got {path}: ") + ".*" + message):
        OnDisk(path)


def test_files_that_do_not_fit_are_refused(tmp_path):
    files = {"x": saved(tmp_path / "x.npy", np.zeros((3, 2))), "y": saved(tmp_path / "y.npy", np.zeros(4, int))}
    with pytest.raises(ValueError, match=re.escape("one common number of rows; got {'x': 3, 'y': 4}")):
        OnDisk(files)
    with pytest.raises(ValueError, match="got no files"):
        OnDisk({})
    with pytest.raises(FileNotFoundError):
        OnDisk(tmp_path / "none.npy")


def test_a_file_that_is_cut_later_is_an_error(tmp_path):
    path = saved(tmp_path / "x.npy", np.zeros((10_000, 4)))
    data = OnDisk(path)
    os.truncate(path, 5000)
    assert len(data[[0, 100]]["x"]) == 2
    with pytest.raises(ValueError, match=r"Expected .*x\.npy to keep its 10000 rows; got fewer"):
        data[[0, 9000]]


# --- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "mixed"), [(1, 4, 2), (10, 3, 2), (1000, 10, 7), (1000, 1, 1), (37, 100, 5)])
def test_blocks_hand_out_each_datum_once(n, size, mixed):
    blocks = Blocks(range(n), size, mixed)
    first, second = list(blocks), list(blocks)
    assert len(blocks) == n
    assert sorted(first) == sorted(second) == list(range(n))
    assert n < 100 or (first != second and first != sorted(first))
    torch.manual_seed(3)
    again = list(blocks)
    torch.manual_seed(3)
    assert list(blocks) == again


def test_so_many_blocks_are_read_together():
    order = torch.tensor(list(Blocks(range(1200), size=10, mixed=8)))
    parts = order.split(80)
    assert len(parts) == 15
    starts = [set((part // 10).tolist()) for part in parts]
    assert [len(each) for each in starts] == [8] * 15
    assert len(set.union(*starts)) == 120
    # shuffled within: neighbours in the file seldom follow each other, 1/80 of the time
    assert ((order[1:] - order[:-1]) == 1).sum() < 60
    assert len(list(islice(Blocks(range(10**8)), 1000))) == 1000  # whose list would take gigabytes


@pytest.mark.parametrize("size", [{"size": 0}, {"mixed": 0}])
def test_sizes_of_blocks(size):
    with pytest.raises(ValueError, match="Expected size and mixed to be at least 1"):
        Blocks(range(5), **size)


# --- epochs of a stream ----------------------------------------------------------------------------


def firsts(batches):
    return [batch[0, 0].item() for batch in batches]


def test_an_epoch_goes_on_where_the_last_one_stopped():
    x = torch.arange(10.0).reshape(5, 2)
    epochs = in_epochs(DataLoader(x, batch_size=1), steps=3)
    assert len(epochs) == 3
    assert [firsts(epochs) for _ in range(3)] == [[0, 2, 4], [6, 8, 0], [2, 4, 6]]
    assert firsts(islice(epochs, 1)) == [8]  # one that is left early, as what `fit` measures
    assert firsts(epochs) == [0, 2, 4]


def test_streams_may_be_functions_and_are_read_as_far_as_they_are_asked_for():
    drawn = []

    def numbers():
        while True:
            drawn.append(len(drawn))
            yield {"x": torch.full((2, 1), float(drawn[-1]))}

    epochs = in_epochs(numbers, steps=4)
    assert [next(iter(stream(epochs)))["x"][0].item() for _ in range(2)] == [0, 1]
    assert [batch["x"][0].item() for batch in stream(epochs)] == [2, 3, 4, 5]
    assert len(drawn) == 6


@pytest.mark.parametrize("batches", [[], iter([torch.zeros(2, 2)] * 3)], ids=["empty", "once"])
def test_a_stream_that_cannot_begin_again_says_so(batches):
    epochs = in_epochs(batches, steps=5)
    with pytest.raises(ValueError, match="can be read again from its beginning"):
        list(epochs)
    with pytest.raises(ValueError, match="Expected steps to be at least 1; got 0"):
        in_epochs(batches, steps=0)


def test_a_stream_that_is_open_is_closed_before_the_interpreter_ends():
    code = """
import sys
from pyrovae.data import in_epochs

def batches(is_finalizing=sys.is_finalizing):
    try:
        while True:
            yield [0.0]
    finally:
        print("closed", is_finalizing())

epochs = in_epochs(batches, steps=2)
list(epochs)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("closed False\n", "")


# --- training and measuring ------------------------------------------------------------------------


class Once(IterableDataset):
    """A stream that can be read but once."""

    def __init__(self, x):
        self.rows = iter(x)

    def __iter__(self):
        return self.rows


def trained(data, val=None, **settings):
    torch.manual_seed(0)
    program = LinearGaussian(4, 1)
    history = fit(program, data, val, seed=0, progress=False, **settings)
    return program, history


def assert_same(one, other):
    (program, history), (like, rows) = one, other
    assert all(torch.equal(p, q) for p, q in zip(program.parameters(), like.parameters(), strict=True))
    names = ("elbo", "val_elbo", "loss")
    assert [[row[name] for name in names] for row in history] == [[row[name] for name in names] for row in rows]


class Rows:
    """What `OnDisk` is, in memory."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}


LOADERS = {
    "shuffled": lambda data: DataLoader(data, 8, shuffle=True),
    "in blocks": lambda data: DataLoader(data, 8, sampler=Blocks(data, 5, 2)),
    "whole minibatches": lambda data: DataLoader(data, None, sampler=BatchSampler(Blocks(data), 8, False)),
    "in epochs": lambda data: in_epochs(DataLoader(data, 8), 5),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_file_trains_as_the_array_in_memory(tmp_path, make):
    x = torch.from_numpy(normal(60, 4).astype(np.float32))
    file = OnDisk(saved(tmp_path / "x.npy", x.numpy()))
    assert_same(
        trained(make(file), DataLoader(file, 60), epochs=2), trained(make(Rows(x)), DataLoader(x, 60), epochs=2)
    )


def test_training_takes_its_epochs_from_a_stream_one_after_the_other():
    trained_on = []

    class Noting(LinearGaussian):
        def guide(self, x):
            if self.training:
                trained_on.append(x[0, 0].item())
            super().guide(x)

    x = torch.arange(2400.0).reshape(600, 4) / 2400
    fit(Noting(4, 1), in_epochs(DataLoader(x, 10), 6), epochs=3, progress=False)
    # one minibatch for the first look, six to be measured before the first epoch and after each
    places = [7 + 12 * epoch + step for epoch in range(3) for step in range(6)]
    assert trained_on[-18:] == [x[10 * place, 0].item() for place in places]


def test_epochs_of_a_stream_have_a_length_for_the_weight_of_the_kl_term():
    x = torch.from_numpy(normal(40, 4).astype(np.float32))
    _, history = trained(in_epochs(DataLoader(x, 10), 3), epochs=2, kl_weight=Linear(5))
    assert [row["kl_weight"] for row in history] == [pytest.approx(2 / 5), 1.0]
    with pytest.raises(ValueError, match="kl_weight to reach 1 within the 6 steps"):
        trained(in_epochs(DataLoader(x, 10), 3), epochs=2, kl_weight=Linear(7))


@pytest.mark.parametrize("n", [500, 35_000], ids=["by measuring", "by training"])
def test_a_stream_that_is_used_up_says_so(n):
    message = "Expected train to hold at least one datum each time that it is read.*in_epochs"
    with pytest.raises(ValueError, match=message):
        trained(DataLoader(Once(torch.zeros(n, 4)), 500), epochs=2)
    x = torch.zeros(20, 4)
    with pytest.raises(ValueError, match=message.replace("train", "val")):
        trained(x, DataLoader(Once(x), 10))


def test_a_file_is_evaluated_as_the_array_in_memory(tmp_path):
    x = torch.from_numpy(normal(50, 4).astype(np.float32))
    torch.manual_seed(0)
    program = LinearGaussian(4, 2)
    loader = DataLoader(OnDisk(saved(tmp_path / "x.npy", x.numpy())), 20)
    found, expected = (evaluate(program, data, 7, batch_size=20, seed=0, progress=False) for data in (loader, x))
    for name in ("log_px", "elbo", "standard_error", "ess", "k_hat"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert found.active_units == expected.active_units


def test_whole_minibatches_are_not_counted_as_data():
    x = torch.from_numpy(normal(60, 2).astype(np.float32))
    whole = DataLoader(x.reshape(3, 20, 2), batch_size=None)
    assert count(whole) is None
    assert count(in_epochs(whole, 2)) is None
    assert count(DataLoader(Rows(x), batch_size=None, sampler=BatchSampler(range(60), 20, False))) == 60
    assert count(DataLoader(x, batch_sampler=BatchSampler(range(60), 20, False))) == 60
    classes = torch.zeros(60, dtype=torch.long)
    program = GaussianMixture(2, 3)
    results = [evaluate(program, data, 1, classes=classes, seed=0, progress=False) for data in (whole, x)]
    assert results[0].clustering == results[1].clustering


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: TensorDataset(x), r"got TensorDataset\. DataLoader\(data_set"),
        (lambda x: (part for part in x.split(5)), r"got generator\..*in_epochs\(stream"),
        (lambda x: x.numpy(), "got ndarray$"),
        (lambda x: list(x.split(5)), "got list of 4, the first a Tensor$"),
        (lambda x: {"x": x, "name": ["a"] * 20}, "got dict with 'x': Tensor, 'name': list$"),
    ],
)
def test_what_is_no_data_is_named(wrong, message):
    with pytest.raises(ValueError, match="Expected train to be a tensor, a pair .* or a dict of tensors; " + message):
        as_data(wrong(torch.zeros(20, 2)), "train")


# --- memory ----------------------------------------------------------------------------------------

STATUS = Path("/proc/self/status")


def own_memory():
    """Resident memory that is the process's own, in MiB: no pages of files."""
    return int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1]) / 1024


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_memory_does_not_grow_with_what_has_passed(verb):
    """Of 800 minibatches, 125 MB, less than 4 MiB stay: 27 minibatches, or 5 kB of each."""
    x, seen = torch.rand(50, 784), []

    class Noise(IterableDataset):
        def __iter__(self):
            for step in range(1000):
                if step in (200, 999):
                    seen.append(own_memory())
                yield x + step  # a new tensor each time

    torch.manual_seed(0)
    program, loader = LinearGaussian(784, 2), DataLoader(Noise(), batch_size=None)
    if verb == "fit":
        fit(program, loader, epochs=1, lr=1e-6, progress=False)
    else:
        evaluate(program, loader, 1, progress=False)
    first, last = seen[-2:]
    assert last - first < 4
