"""What kills, damage, a full disk and a second writer do to a store."""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import writer_to_kill

from keras_ptloss.soft_labels import SoftLabels, journal

SCRIPT = pathlib.Path(writer_to_kill.__file__)


def contents(path):
    """Return the files of a store, without its lock."""
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.name != ".lock"
    }


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(journal, "FILE_BYTES", 30_000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Write the stores without a kill; return their contents by kind."""
    found = {}
    for kind in ("write", "from_array"):
        folder = tmp_path_factory.mktemp(kind)
        writer_to_kill.run(kind, folder)
        found[kind] = contents(folder / "store")
    return found


class TestKills:
    def check(self, kind, folder, undisturbed, stores):
        """Kill two calls for each store, let a third end, compare it."""
        command = [sys.executable, SCRIPT, kind, folder, str(stores)]
        done = subprocess.run(command, capture_output=True, check=True)
        for number in range(stores):
            of_store = folder / str(number)
            writer_to_kill.run(kind, of_store)
            assert [f.name for f in of_store.iterdir()] == ["store"]
            assert contents(of_store / "store") == undisturbed[kind]
        assert int(done.stdout)  # not all calls had ended before

    def test_before_a_journal_is_deleted(
        self, undisturbed, tmp_path, monkeypatch
    ):
        """Its rows are in an Arrow file already."""

        def killed(path, missing_ok=False):
            raise KeyboardInterrupt(path)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt, match="journal-000000"):
                writer_to_kill.run("write", tmp_path)
        assert list(tmp_path.glob("store/*.arrow"))
        writer_to_kill.run("write", tmp_path)
        assert contents(tmp_path / "store") == undisturbed["write"]

    @pytest.mark.ci
    @pytest.mark.parametrize("kind", ["write", "from_array"])
    def test_by_sigkill(self, kind, undisturbed, tmp_path):
        self.check(kind, tmp_path, undisturbed, stores=3)

    @pytest.mark.nightly
    @pytest.mark.parametrize("kind", ["write", "from_array"])
    def test_fifty_by_sigkill(self, kind, undisturbed, tmp_path):
        self.check(kind, tmp_path, undisturbed, stores=25)

    @pytest.mark.parametrize("kind", ["write", "from_array"])
    def test_at_every_call_of_the_system(
        self, kind, undisturbed, tmp_path, monkeypatch
    ):
        """As a kill before any append, rename or removal."""

        class Killed(BaseException):
            pass

        def patched(patch, limit):
            count = 0

            def counted(function):
                def call(*arguments, **options):
                    nonlocal count
                    count += 1
                    if count > limit:
                        raise Killed
                    return function(*arguments, **options)

                return call

            patch.setattr(os, "truncate", counted(os.truncate))
            for name in ("open", "rename", "unlink", "write_text"):
                method = counted(getattr(pathlib.Path, name))
                patch.setattr(pathlib.Path, name, method)

        for limit in range(0, 500, 3):
            with monkeypatch.context() as patch:
                patched(patch, limit)
                try:
                    writer_to_kill.run(kind, tmp_path)
                    break
                except Killed:
                    pass
        writer_to_kill.run(kind, tmp_path)
        assert contents(tmp_path / "store") == undisturbed[kind]

    def test_while_a_store_is_overwritten(self, tmp_path, monkeypatch):
        """What is left is not complete, whichever files it has."""
        writer_to_kill.run("write", tmp_path)
        files = len(list(tmp_path.glob("store/*.arrow")))
        unlink = pathlib.Path.unlink
        for left in range(files - 1, 0, -1):

            def killed(path, missing_ok=False, left=left):
                unlink(path)
                if len(list(path.parent.glob("*.arrow"))) == left:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(pathlib.Path, "unlink", killed)
                with pytest.raises(KeyboardInterrupt):
                    SoftLabels.write(
                        len, [0.0], tmp_path / "store", overwrite=True
                    )
            with pytest.raises(ValueError, match="unfinished"):
                SoftLabels.open(tmp_path / "store")

    def test_an_equal_store_is_not_deleted(self, tmp_path, monkeypatch):
        """A kill could leave some of its files."""
        deleted = []
        delete = shutil.rmtree

        def watched(path, **options):
            deleted.append(path.name)
            delete(path, **options)

        monkeypatch.setattr(shutil, "rmtree", watched)
        for _ in range(2):
            writer_to_kill.run("from_array", tmp_path)
        assert deleted == ["store.partial"]

    @pytest.mark.ci
    def test_another_teacher_after_a_killed_import(self, tmp_path):
        """The store is of one teacher, and nothing of the import is left."""

        path = tmp_path / "store"
        script = (
            "import os, signal, sys, numpy as np\n"
            "from keras_ptloss import SoftLabels\n"
            "class Dies:\n"
            "    shape = (10_000, 2)\n"
            "    def __len__(self): return 10_000\n"
            "    def __getitem__(self, part):\n"
            "        if part.start: os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return np.tile([.25, .75], (part.stop, 1))\n"
            f"SoftLabels.from_array(Dies(), {str(path)!r})\n"
        )
        done = subprocess.run([sys.executable, "-c", script])
        assert done.returncode == -signal.SIGKILL
        labels = SoftLabels.write(
            lambda b: np.tile([0.5, 0.5], (len(b), 1)),
            np.arange(9.0),
            path,
            verbose=0,
        )
        assert (np.asarray(labels) == 0.5).all()
        assert [f.name for f in tmp_path.iterdir()] == ["store"]


class TestDamage:
    @pytest.fixture
    def store(self, tmp_path, probabilities, x):
        SoftLabels.from_array(probabilities, tmp_path / "a", inputs=x)
        return tmp_path / "a"

    def check_bits(self, store, count):
        rng = np.random.default_rng(0)
        (file,) = store.glob("*.arrow")
        whole = file.read_bytes()
        for number in range(count):
            # Half of them in the description at the end, which is small.
            first = len(whole) - 1000 if number % 2 else 0
            bit = int(rng.integers(8 * first, 8 * len(whole)))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with pytest.raises(ValueError, match="damaged"):
                SoftLabels.open(store)
            file.write_bytes(whole)
        SoftLabels.open(store)

    def test_flipped_bits_are_seen(self, store):
        self.check_bits(store, 100)

    @pytest.mark.nightly
    def test_a_thousand_flipped_bits_are_seen(self, store):
        self.check_bits(store, 1000)

    def test_another_version(self, store):
        """Its description is whole, but has a field that is unknown here."""
        pa = pytest.importorskip("pyarrow")
        (file,) = store.glob("*.arrow")
        table = pa.ipc.open_file(file).read_all()
        table = table.replace_schema_metadata({"keras_ptloss": '{"new": 1}'})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.rename(store / f"000000-{journal.checksum_of(file)}-end.arrow")
        with pytest.raises(ValueError, match="another version"):
            SoftLabels.open(store)

    def test_a_cut_or_missing_file(self, store):
        file = next(store.glob("*.arrow"))
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ValueError, match="damaged"):
            SoftLabels.open(store)
        file.rename(file.with_name(file.name.replace("000000", "000001")))
        with pytest.raises(ValueError, match="000000.* is missing"):
            SoftLabels.open(store)

    @pytest.mark.parametrize("cut", [False, True])
    def test_a_damaged_journal(self, cut, tmp_path):
        """What comes after a flipped bit or a cut is asked for again."""
        rows = np.random.default_rng(0).dirichlet(np.ones(4), 100)

        def fails(batch):
            if batch[0] >= 50:
                raise TimeoutError
            return rows[batch]

        options = {"batch_size": 10, "teacher_name": "t", "verbose": 0}
        with pytest.raises(RuntimeError):
            SoftLabels.write(fails, np.arange(100), tmp_path / "a", **options)
        file = tmp_path / "a" / "journal-000000"
        data = bytearray(file.read_bytes())
        half = len(data) // 2
        data[half] ^= 16
        file.write_bytes(data[:half] if cut else data)
        labels = SoftLabels.write(
            lambda b: rows[b], np.arange(100), tmp_path / "a", **options
        )
        np.testing.assert_allclose(labels, rows, 1e-3)


class TestFullDisk:
    @pytest.fixture
    def limited(self):
        """Limit the size of the files that this process writes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        yield limit
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_a_journal_that_cannot_grow(self, limited, tmp_path):
        rows = np.random.default_rng(0).dirichlet(np.ones(50), 300)
        call = (lambda b: rows[b], np.arange(300), tmp_path / "a")
        options = {"teacher_name": "t", "verbose": 0}
        limited(20_000)
        with pytest.raises(OSError, match="disk space .* same call"):
            SoftLabels.write(*call, **options)
        size = (tmp_path / "a" / "journal-000000").stat().st_size
        assert 15_000 < size <= 20_000
        limited(10**9)
        labels = SoftLabels.write(*call, **options)
        np.testing.assert_allclose(labels, rows, 1e-3, 1e-7)

    def test_a_file_that_cannot_be_sealed(self, monkeypatch, tmp_path):
        def full(*_):
            raise OSError(28, "No space left on device")

        rows = np.full((9, 2), 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(journal, "sync", full)
            with pytest.raises(OSError, match="No space left"):
                SoftLabels.from_array(rows, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        SoftLabels.from_array(rows, tmp_path / "a")
        assert [f.name for f in tmp_path.iterdir()] == ["a"]


class TestTwoWriters:
    @pytest.mark.parametrize("name", ["a", "a.partial"])
    def test_the_second_is_refused(self, name, tmp_path):
        with (
            journal.writing(tmp_path / name),
            pytest.raises(RuntimeError, match="Another process"),
        ):
            if name == "a":
                SoftLabels.write(len, np.arange(3), tmp_path / "a", verbose=0)
            else:
                SoftLabels.from_array([[0.5, 0.5]], tmp_path / "a")

    def test_fsync(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", synced.append)
        for fsync in (False, True):
            SoftLabels.write(
                lambda b: np.full((len(b), 2), 0.5),
                np.arange(10),
                tmp_path / str(fsync),
                batch_size=1,
                fsync=fsync,
                verbose=0,
            )
            synced.append("end")
        first = synced.index("end")
        assert len(synced) - first - 2 == first + 10
