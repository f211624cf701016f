"""Several processes on this machine give the single-process result; factorisations end on several devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from sul_jax import energy, k_means
from sul_jax.cli import cluster
from sul_jax.estimators import KMeans

PROGRAM = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, index, number, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=number, process_id=index)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sul_jax import energy

assert jax.device_count() == 2 * number
images = np.asarray(np.random.default_rng(0).random((16, 8, 8, 2)), np.float32)
window = {"kernel_size": 3, "padding": 1}
state = energy.init(jax.random.key(0), images, num_subspaces=5, rank=2, **window)
state = jax.tree.map(np.asarray, state)
mesh = Mesh(np.array(jax.devices()), ("batch",))
local = np.split(images, number)[index]  # each process holds its own part of the batch
batch = jax.make_array_from_process_local_data(NamedSharding(mesh, P("batch")), local)
step = jax.jit(
    jax.shard_map(
        lambda s, x: energy.update(s, x, axis_name="batch", **window),
        mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(),
    )
)
for _ in range(3):
    state, info = step(state, batch)

# Vectors of which each process has a chunk, and the last one the rest: their sums are those of all.
from sul_jax import k_means, training
vectors = np.random.default_rng(1).standard_normal((400, 5), np.float32)
parts = np.array_split(vectors, 8)
centers = k_means.KMeansState(vectors[:6], np.zeros(6, np.float32))
statistics, apply = jax.jit(k_means.statistics), jax.jit(k_means.apply)
own = parts[index:] if index == number - 1 else parts[index : index + 1]
for _ in range(3):
    centers, _ = apply(centers, training.sum_chunks(statistics, centers, own))

# An estimator is given the same shards everywhere, of which each process reads its part.
from pathlib import Path
from sul_jax.estimators import KMeans, _vectors
_vectors._CHUNK = 64
model = KMeans(4, random_state=0).fit(Path(out).parent / "shards", sample_weight=np.arange(400) % 3)
np.testing.assert_array_equal(model.predict(Path(out).parent / "shards"), model.labels_)
np.testing.assert_array_equal(KMeans(4, random_state=0).fit(vectors).labels_.shape, (400,))
if index == 0:
    np.savez(
        out, bases=np.asarray(state.bases), energy=np.asarray(info.energy), centers=centers.centroids,
        labels=model.labels_, inertia=model.inertia_,
    )
"""


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_give_what_one_gives(number: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out.npz"
    blobs = np.float32(make_blobs(400, 6, centers=4, random_state=0)[0])
    (tmp_path / "shards").mkdir()
    for shard, part in enumerate(np.array_split(blobs, 3)):
        np.save(tmp_path / "shards" / f"{shard}.npy", part)
    workers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(index), str(number), str(out)])
        for index in range(number)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0] * number
    finally:
        for worker in workers:
            worker.kill()
    images = np.asarray(np.random.default_rng(0).random((16, 8, 8, 2)), np.float32)
    window = {"kernel_size": 3, "padding": 1}
    state = energy.init(jax.random.key(0), images, num_subspaces=5, rank=2, **window)
    step = jax.jit(lambda s, x: energy.update(s, x, **window))
    for _ in range(3):
        state, info = step(state, images)
    with np.load(out) as found:
        projectors = [np.einsum("krd,kre->kde", b, b) for b in (found["bases"], state.bases)]
        np.testing.assert_allclose(projectors[0], projectors[1], atol=1e-3)
        np.testing.assert_allclose(found["energy"], info.energy, rtol=1e-4)
        vectors = np.random.default_rng(1).standard_normal((400, 5), np.float32)
        centers = k_means.KMeansState(vectors[:6], np.zeros(6, np.float32))
        for _ in range(3):
            centers, _ = jax.jit(k_means.update)(centers, vectors)
        np.testing.assert_allclose(found["centers"], centers.centroids, atol=1e-5)
        model = KMeans(4, random_state=0).fit(blobs, sample_weight=np.arange(400) % 3)
        assert adjusted_rand_score(found["labels"], model.labels_) == 1
        np.testing.assert_allclose(found["inertia"], model.inertia_, rtol=1e-4)


# As from the command line, but the process number `dying` is killed in its second fit.
COMMAND = """
import os, signal, sys
dying = int(sys.argv.pop(1))
from sul_jax import cli
from sul_jax.estimators import KMeans
fit, fits = KMeans.fit, []
def counted(self, *given, **options):
    fits.append(self)
    if len(fits) == 2 and os.environ["JAX_PROCESS_ID"] == str(dying):
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(self, *given, **options)
KMeans.fit = counted
cli.main()
"""


def _together(number: int, words: list[str], dying: int = -1) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of processes that run `sul-jax` together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(number)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(dying), *words, "--distributed"],
            env={**os.environ, **meeting, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(number)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, *two) for worker, two in zip(workers, said, strict=True)]


@pytest.mark.slow
def test_the_command_in_several_processes(tmp_path: Path) -> None:
    """Where one dies, all end with a line; with --resume they go on to what a single process gives."""
    (tmp_path / "shards").mkdir()
    points = np.float32(make_blobs(200, 6, centers=5, random_state=0)[0])
    for number, part in enumerate(np.array_split(points, 4)):
        np.save(tmp_path / "shards" / f"{number}.npy", part)
    workdir = tmp_path / "run"
    given = ["--embeddings", str(tmp_path / "shards"), "--num-clusters", "5", "--seeds", "2"]
    words = ["cluster", *given, "--metric", "euclidean", "--workdir", str(workdir)]

    ended = _together(3, words, dying=2)
    assert [status for status, _, _ in ended] == [2, 2, -9], ended
    for index, (_, _, errors) in enumerate(ended[:2]):
        lines = [line for line in errors.splitlines() if line.startswith("error")]
        ended_early = "another process of this run has ended; start all of them again with --resume"
        assert lines == [f"error: process {index}: {ended_early}"]
    assert (workdir / "network-seed0-5").is_dir()
    assert not (workdir / "clusters.csv").exists()

    ended = _together(3, [*words, "--resume"])
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    assert "report:" in ended[0][1]
    assert "report:" not in ended[1][1]
    assert "seed 0:" not in ended[0][1]
    found = np.genfromtxt(workdir / "clusters.csv", delimiter=",", skip_header=1)[:, 1]
    assert adjusted_rand_score(found, KMeans(5, random_state=0).fit_predict(points)) == 1


def test_processes_that_cannot_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "mine.npy", np.ones((9, 4), np.float32))
    options = {"num_clusters": (2,), "workdir": tmp_path / "run", "distributed": True}
    with pytest.raises(ValueError, match="distributed shares vectors among processes: give --embeddings"):
        cluster.run(cluster.Config(tmp_path, **options))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(
        ValueError, match="distributed needs a launcher .*: JAX_NUM_PROCESSES='two' is not a n"
    ):
        cluster.run(cluster.Config(embeddings=tmp_path / "mine.npy", **options))


FACTORISATIONS = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sul_jax import k_subspaces

vectors = jax.random.normal(jax.random.key(0), (200, 800))
everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), P())
vectors = jax.device_put(vectors, everywhere)
begin = jax.jit(lambda key, x: k_subspaces.init(key, x, num_subspaces=58, rank=16))
state = begin(jax.random.key(1), vectors)
state, _ = jax.jit(k_subspaces.update)(state, vectors)
state.bases.block_until_ready()
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_factorisations_end_on_several_devices(devices: int) -> None:
    """With sizes as published: batches of them waited for each other's threads without end."""
    done = subprocess.run([sys.executable, "-c", FACTORISATIONS, str(devices)], timeout=120)
    assert done.returncode == 0
