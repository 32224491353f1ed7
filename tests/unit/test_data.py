import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import deploypipe.data.images
from deploypipe.data.batches import CropFlip, batches, labels_of, n_batches, split, take
from deploypipe.data.images import IMAGENET, Files, Images
from deploypipe.data.load import load_data
from deploypipe.errors import UsageError

torch.set_num_threads(1)
rng = np.random.default_rng(0)


def write_image(path: Path, height=8, width=8, mode="RGB", suffix=".png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = rng.integers(0, 256, (height, width, 3) if mode == "RGB" else (height, width), dtype=np.uint8)
    Image.fromarray(array).save(path.with_suffix(suffix))
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for part, n in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                write_image(root / part / name / f"{i}.png")
    return root


def load(root, tmp_path, **options):
    return load_data(f"imagefolder:{root}", cache=tmp_path / "cache", **options)


def error_of(spec, **options) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_data(spec, **options)
    assert caught.value.fix
    return caught.value


def test_image_folder_gives_normalised_pixels(folder, tmp_path):
    data = load(folder, tmp_path)
    assert (len(data.train), len(data.test), data.classes, data.input_shape) == (10, 4, ("cat", "dog"), (3, 8, 8))
    image = np.asarray(Image.open(folder / "train" / "dog" / "0.png")).astype(np.float64) / 255
    wanted = (image - IMAGENET[0]) / IMAGENET[1]
    inputs, label = data.train[5]
    np.testing.assert_allclose(inputs.permute(1, 2, 0).double().numpy(), wanted, atol=1e-6)
    assert label == 1
    assert "10 training and 4 test images of 2 classes, 3x8x8" in data.description


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    first = load(folder, tmp_path)
    monkeypatch.setattr(deploypipe.data.images, "decode", lambda *_: pytest.fail("decoded again"))
    second = load(folder, tmp_path)
    assert first.key == second.key
    assert torch.equal(first.train.pixels, second.train.pixels)


def test_a_changed_folder_is_decoded_again(folder, tmp_path):
    first = load(folder, tmp_path)
    time.sleep(0.01)
    write_image(folder / "train" / "cat" / "0.png")
    second = load(folder, tmp_path)
    assert first.key != second.key
    assert not torch.equal(first.train.pixels[0], second.train.pixels[0])
    assert torch.equal(first.train.pixels[1:], second.train.pixels[1:])
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one file per folder: old ones go"


@pytest.mark.parametrize("damage", ["garbage", "unwritable"])
def test_a_damaged_or_forbidden_cache_is_no_obstacle(folder, tmp_path, damage):
    wanted = load(folder, tmp_path).train.pixels
    cache = tmp_path / "cache"
    if damage == "garbage":
        for file in cache.iterdir():
            file.write_bytes(b"garbage")
    else:
        for file in cache.iterdir():
            file.unlink()
        cache.rmdir()
        cache.write_text("a file where the folder should be")
    assert torch.equal(load(folder, tmp_path).train.pixels, wanted)


def test_large_images_stay_on_disk_and_read_the_same(folder, tmp_path, monkeypatch):
    in_memory = load(folder, tmp_path, size=(3, 6, 6))
    monkeypatch.setattr(deploypipe.data.images, "MEMORY_LIMIT_BYTES", 100)
    lazy = load(folder, tmp_path, size=(3, 6, 6))
    assert isinstance(lazy.train, Files)
    assert isinstance(in_memory.train, Images)
    assert lazy.key == in_memory.key
    for one, other in zip(batches(lazy.train, 3, shuffle_seed=4), batches(in_memory.train, 3, shuffle_seed=4), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_small_images_for_a_model_of_large_ones_are_scaled_when_they_are_taken(monkeypatch):
    size = (3, 48, 40)
    eager = load_data("demo", size=size)
    monkeypatch.setattr(deploypipe.data.images, "MEMORY_LIMIT_BYTES", 1000 * 3 * 48 * 40)
    lazy = load_data("demo", size=size)
    assert (lazy.key, lazy.description, lazy.input_shape) == (eager.key, eager.description, size)
    assert lazy.train.pixels.shape[1:] == (3, 8, 8)
    assert torch.equal(lazy.test.pixels, eager.test.pixels)  # 355 images fit
    for one, other in zip(batches(lazy.train, 700, shuffle_seed=4), batches(eager.train, 700, shuffle_seed=4), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_resizing_keeps_the_shape_of_things_and_the_centre(tmp_path):
    array = np.zeros((40, 80, 3), dtype=np.uint8)
    array[:, 20:60] = 255  # the central square is white
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / part / "a" / "0.png")
    data = load(tmp_path, tmp_path, size=(20, 20), normalise=((0, 0, 0), (1, 1, 1)))
    assert data.train[0][0][:, :, 1:-1].min() == 1
    gray = load(tmp_path, tmp_path, size=(1, 10, 10))
    assert gray.input_shape == (1, 10, 10)
    photo = load(tmp_path, tmp_path, size=(3, 224, 224))
    assert photo.input_shape == (3, 224, 224)


def test_folder_errors(folder, tmp_path):
    (tmp_path / "pet.zip").write_text("")
    assert error_of(f"imagefolder:{tmp_path / 'pet'}").fix == "did you mean 'pets'? (known: pets)", "a folder, no file"
    assert "not a folder" in error_of(f"imagefolder:{folder / 'train' / 'cat' / '0.png'}").message
    assert "no folder is named" in error_of("imagefolder:").message
    assert "train" in error_of(f"imagefolder:{folder / 'train'}").fix
    (tmp_path / "a" / "train").mkdir(parents=True)
    assert "no classes" in error_of(f"imagefolder:{tmp_path / 'a'}").message
    write_image(tmp_path / "a" / "train" / "x" / "0.png")
    assert "no test set" in error_of(f"imagefolder:{tmp_path / 'a'}").message
    (tmp_path / "a" / "train" / "empty").mkdir()
    (tmp_path / "a" / "train" / "empty" / "notes.txt").write_text("")
    write_image(tmp_path / "a" / "val" / "x" / "0.png")
    assert "class 'empty' holds no image" in error_of(f"imagefolder:{tmp_path / 'a'}").message
    write_image(folder / "test" / "fish" / "0.png")
    mismatch = error_of(f"imagefolder:{folder}")
    assert "differ" in mismatch.message
    assert "only in test/: fish" in mismatch.fix


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(folder, tmp_path, content):
    path = folder / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(UsageError, match=r"'3\.png' is not a readable image") as caught:
        load(folder, tmp_path)
    assert caught.value.at == str(path)


def test_an_unlabelled_test_folder_gives_way_to_val(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    (folder / "test").mkdir()
    write_image(folder / "test" / "0.png")
    assert "train + val" in load(folder, tmp_path).description


def test_labels_of_a_dataset_that_are_no_integers_are_refused_before_it_is_split():
    images = torch.randn(20, 3, 4, 4)
    for labels in (torch.eye(4)[torch.arange(20) % 4], torch.arange(20)[:, None], torch.rand(20)):
        with pytest.raises(UsageError, match="not integers"):
            load_data(TensorDataset(images, labels))


def test_cifar10_binary(tmp_path):
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    records = rng.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, part in zip(names, records, strict=True):
        part.tofile(root / name)
    for place in (root, tmp_path):
        data = load_data(f"cifar10:{place}")
        assert (len(data.train), len(data.test), data.classes[6]) == (20, 4, "frog")
        assert torch.equal(data.train.labels, torch.tensor(records[:5, :, 0].reshape(-1)).long())
        red_first_row = torch.tensor(records[2, 1, 1:33])
        assert torch.equal(data.train.pixels[9, 0, 0], red_first_row)
    (root / "data_batch_3.bin").write_bytes(b"x" * 3000)
    assert "'data_batch_3.bin' is damaged" in error_of(f"cifar10:{tmp_path}").message
    (root / "data_batch_3.bin").unlink()
    assert "'data_batch_3.bin' is missing" in error_of(f"cifar10:{tmp_path}").message


def test_cifar10_pickles_are_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    assert "pickles" in error_of(f"cifar10:{tmp_path}").message
    assert "binary version" in error_of(f"cifar10:{tmp_path / 'cifar-10-batches-py'}").fix


def test_demo_fits_other_models():
    assert load_data("demo", size=(3, 32, 32), normalise=IMAGENET).input_shape == (3, 32, 32)
    assert load_data("demo").key != load_data("demo", size=(1, 8, 8)).key
    exact = load_data("demo", size=(1, 8, 8)).train.pixels
    assert exact.max() == 255, "at the native size the pixels are the published ones"


def pairs(n=20, classes=4):
    return TensorDataset(torch.arange(n * 3.0).view(n, 3), torch.arange(n) % classes)


class Slow(Dataset):
    def __init__(self, n=10, sample=lambda i: (torch.full((2,), float(i)), i % 3)):
        self.n, self.sample = n, sample

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.sample(index)


def test_datasets_from_python():
    data = load_data((pairs(), pairs(8)))
    assert (len(data.train), len(data.test), data.classes, data.augment) == (20, 8, ("0", "1", "2", "3"), None)
    whole = load_data(pairs(100), seed=1)
    assert (len(whole.train), len(whole.test)) == (80, 20)
    assert load_data(pairs(100), seed=1).key == whole.key
    assert load_data(pairs(100), seed=2).key != whole.key
    assert load_data(Slow()).classes == ("0", "1", "2")


def test_data_factory(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def make(n=30): return TensorDataset(torch.ones(n, 1, 4, 4), torch.arange(n) % 2)\n"
        "def both(): return make(), make(10)\n"
        "def wrong(): return 3\n"
        "def fails(): raise ValueError('no disk')\n"
    )
    assert len(load_data(f"{path}:make").train) == 24
    assert len(load_data(f"{path}:both").test) == 10
    assert "data is int" in error_of(f"{path}:wrong").message
    assert "ValueError: no disk" in error_of(f"{path}:fails").message
    assert "'demo'" in error_of("dem").fix
    assert "'make'" in error_of(f"{path}:mak").fix


def drawn() -> tuple[object, ...]:
    """What the three global generators would give next."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    values = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return values


DRAWS = {
    "random": "random.random()",
    "numpy": "np.random.rand()",
    "torch": "float(torch.rand(()))",
}


@pytest.mark.parametrize("place", ["at import", "in the factory", "in a transform"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_key_of_data_that_draws_is_the_same_at_every_start(tmp_path, draw, place):
    values = ["0.0", "0.0", "0.0"]
    values[["at import", "in the factory", "in a transform"].index(place)] = draw
    keys, after = [], []
    for start in range(2):  # each file is a module of its own: what one start of the program imports
        path = tmp_path / f"start{start}.py"
        path.write_text(
            "import random\nimport numpy as np\nimport torch\nfrom torch.utils.data import Dataset\n"
            f"OFFSET = {values[0]}\n"
            "class Drawing(Dataset):\n"
            f"    def __init__(self): self.offset = {values[1]}\n"
            "    def __len__(self): return 40\n"
            "    def __getitem__(self, i):\n"
            f"        return torch.full((1, 4, 4), i + OFFSET + self.offset + {values[2]}), i % 4\n"
            "def make(): return Drawing(), Drawing()\n"
        )
        before = drawn()
        keys.append(load_data(f"{path}:make", seed=start).key)
        after.append(drawn() == before)
        random.random(), np.random.rand(), torch.rand(())  # the next start finds other states
    assert keys[0] == keys[1]
    assert all(after), "the states of the generators are put back"


@pytest.mark.parametrize("part", ["inputs", "labels"])
def test_the_key_of_data_in_memory_follows_all_of_it(part):
    """One sample of four hundred, whichever: none of those that stand for the others where they are not in memory."""
    keys = set()
    for changed in (None, 7, 202):
        inputs, labels = torch.arange(400 * 3.0).view(400, 3), torch.arange(400) % 4
        if changed is not None:
            {"inputs": inputs, "labels": labels}[part][changed] = 1
        data = TensorDataset(inputs, labels)
        assert load_data(data).key == load_data(data).key
        keys |= {load_data(data).key, load_data((Subset(data, range(300)), Subset(data, range(300, 400)))).key}
    assert len(keys) == 6


def test_the_key_of_a_factorys_data_follows_its_file(tmp_path):
    text = (
        "import torch\nfrom torch.utils.data import Dataset\n"
        "class Doubled(Dataset):\n    def __len__(self): return 400\n"
        "    def __getitem__(self, i): return torch.full((2,), 2.0 * (i == 7)), 0\n"
        "def make(): return Doubled(), Doubled()\n"
    )
    keys = []
    for factor in ("2.0", "3.0"):
        (tmp_path / "doubled.py").write_text(text.replace("2.0", factor))
        keys.append(load_data(f"{tmp_path / 'doubled.py'}:make").key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (lambda i: (torch.zeros(2, dtype=torch.uint8), 0), "not float"),
        (lambda i: (torch.zeros(2), 0.5), "labels are"),
        (lambda i: torch.zeros(2), "not a pair"),
        (lambda i: (torch.zeros(i + 1), 0), "cannot be put into a batch"),
        (lambda i: ("text", 0), "not a pair"),
        (lambda i: {}["x"], "KeyError"),
    ],
)
def test_samples_of_another_kind(sample, text):
    with pytest.raises(UsageError, match=text):
        list(batches(Slow(4, sample), 4))


def test_batches_cover_every_sample_once_in_seeded_order():
    for dataset in (pairs(), Slow(20), Subset(pairs(40), list(range(0, 40, 2)))):
        wanted = sorted(take(dataset, torch.arange(20))[0][:, 0].tolist())
        for seed in (None, 0, 7):
            seen = [x[:, 0].tolist() for x, _ in batches(dataset, 6, shuffle_seed=seed)]
            assert [len(part) for part in seen] == [6, 6, 6, 2]
            assert sorted(value for part in seen for value in part) == wanted
            assert seen == [x[:, 0].tolist() for x, _ in batches(dataset, 6, shuffle_seed=seed)]
    assert n_batches(pairs(), 6) == 4
    assert n_batches(pairs(), 6, drop_last=True) == 3 == len(list(batches(pairs(), 6, drop_last=True)))
    assert n_batches(pairs(), 50, drop_last=True) == 1 == len(list(batches(pairs(), 50, drop_last=True)))


def test_shards_are_disjoint_and_equally_long():
    parts = [torch.cat([x[:, 0] for x, _ in batches(pairs(), 4, shuffle_seed=3, shard=(i, 3))]) for i in range(3)]
    assert [len(part) for part in parts] == [6, 6, 6]
    assert len(torch.cat(parts).unique()) == 18


@pytest.mark.parametrize("fill", [None, (-1.0, -2.0)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_yield_exactly_the_shifted_copies(fill, flip):
    """Brute force: every output is one of the (2p+1)^2 crops of the padded image or its mirror, and all of them occur."""
    image = torch.arange(2 * 5 * 6.0).view(1, 2, 5, 6)
    padding = 2
    if fill is None:
        padded = torch.nn.functional.pad(image, [padding] * 4, mode="reflect")
    else:
        frame = torch.tensor(fill).view(1, 2, 1, 1)
        padded = torch.nn.functional.pad(image - frame, [padding] * 4) + frame
    crops = [padded[0, :, i : i + 5, j : j + 6] for i in range(5) for j in range(5)]
    if flip:
        crops += [crop.flip(2) for crop in crops]
    augment = CropFlip(padding, flip, fill)
    out = augment(image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    matches = (out[:, None] == torch.stack(crops)[None]).flatten(2).all(2)
    assert bool((matches.sum(1) >= 1).all())
    counts = matches.sum(0)
    assert counts.min() > 0.4 * 2000 / len(crops)
    assert counts.max() < 2.0 * 2000 / len(crops)


def test_split_is_stratified_disjoint_and_complete():
    dataset = TensorDataset(torch.arange(100.0)[:, None], torch.tensor([0] * 80 + [1] * 20))
    fit, held_out = split(dataset, 0.2, seed=0)
    ours, theirs = (set(take(part, torch.arange(len(part)))[0][:, 0].tolist()) for part in (fit, held_out))
    assert ours | theirs == set(range(100))
    assert not ours & theirs
    assert sum(i >= 80 for i in theirs) == 4
    again = split(dataset, 0.2, seed=0)[1]
    assert again.indices == held_out.indices
    assert split(dataset, 0.2, seed=1)[1].indices != held_out.indices
    for fraction in (0, 1, -0.1, 1.5, 0.001):
        with pytest.raises(UsageError):
            split(dataset, fraction, seed=0)


@pytest.mark.parametrize(("classes", "each", "wanted"), [(100, 6, 40), (1000, 100, 512), (7, 13, 20), (9, 6, 27), (30, 4, 1)])
def test_split_holds_out_as_many_as_were_asked_for(classes, each, wanted):
    """Rounding class by class gives none of 6 * 0.067, and one of every class that has half of one."""
    labels = torch.arange(classes * each) % classes
    dataset = TensorDataset(torch.zeros(len(labels), 1), labels)
    held_out = split(dataset, wanted / len(labels), seed=0)[1]
    assert len(held_out) == wanted
    counts = torch.bincount(labels[held_out.indices], minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert split(dataset, wanted / len(labels), seed=0)[1].indices == held_out.indices
    other = torch.bincount(labels[split(dataset, wanted / len(labels), seed=1)[1].indices], minlength=classes)
    assert (wanted % classes == 0) == torch.equal(other, counts), "the seed decides which classes have one more"


@pytest.mark.parametrize(("sizes", "fraction"), [((80, 20), 0.2), ((37, 41, 22), 0.1), ((178, 182, 177), 0.3), ((5, 5), 0.4)])
def test_split_is_what_it_was_where_rounding_class_by_class_adds_up(sizes, fraction):
    """What was cached, and results that were published, depend on it."""
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    groups = [order[labels[order] == label] for label in range(len(sizes))]
    expected = torch.cat([group[: round(fraction * len(group))] for group in groups])
    assert len(expected) == round(fraction * len(labels))
    found = split(TensorDataset(torch.zeros(len(labels), 1), labels), fraction, seed=3)[1]
    assert found.indices == sorted(expected.tolist())


def test_files_of_other_kinds_are_passed_over(folder, tmp_path):
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "train" / ".hidden").mkdir()
    write_image(folder / "train" / "cat" / "deeper" / "9.png")
    (folder / "train" / "cat" / "link.png").symlink_to(folder / "train" / "dog" / "0.png")
    assert len(load(folder, tmp_path).train) == 12


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_are_scaled(tmp_path, suffix, channels):
    array = np.array([[0, 256], [0x8000, 0xFFFF]], dtype=np.uint16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 2 2 65535\n" + array.astype(">u2").tobytes())
    else:
        Image.fromarray(array).save(path)
    pixels = deploypipe.data.images.decode([path], (channels, 2, 2))
    assert pixels.tolist() == [[[[0, 1], [128, 255]]] * channels]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_32_bits_are_refused(tmp_path, kind):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((2, 2), 1000, dtype=kind)).save(path)
    with pytest.raises(UsageError, match=r"'a.tif'[\s\S]*32 bits a pixel"):
        deploypipe.data.images.decode([path], (1, 2, 2))


def test_images_of_two_channels_are_refused(folder):
    assert "have 1 or 3 channels, the model takes 2" in error_of(f"imagefolder:{folder}", size=(2, 8, 8)).message
    assert load_data("demo", size=(2, 8, 8)).input_shape == (2, 8, 8)


@pytest.mark.parametrize("data", ["demo", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_means_of_another_number_than_the_channels_are_refused(folder, data, channels):
    spec = data if data == "demo" else f"imagefolder:{folder}"
    found = error_of(spec, size=(channels, 8, 8), normalise=((0.5, 0.5), (0.5, 0.5)))
    assert f"2 means are declared for {channels} channels" in found.message


@pytest.mark.parametrize("to", ["nowhere.png", "link.png"])
def test_a_link_that_leads_nowhere_is_named(folder, to):
    (folder / "train" / "cat" / "link.png").symlink_to(to)
    found = error_of(f"imagefolder:{folder}")
    assert "'link.png' cannot be looked at" in found.message
    assert found.at.endswith("train/cat/link.png")


def test_a_link_to_a_folder_above_adds_no_image(folder, tmp_path):
    (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat")
    assert len(load(folder, tmp_path).train) == 10


def test_a_file_may_have_a_name_that_is_no_text_and_a_class_may_not(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / f"{name}.png")
    assert len(load(folder, tmp_path).train) == 10
    (folder / "train" / "cat").rename(folder / "train" / name)
    assert "is not UTF-8" in error_of(f"imagefolder:{folder}").message


@pytest.mark.parametrize(
    "targets",
    [["cat", "dog"] * 10, [{"box": 1}] * 20, [[0, 1]] * 20, [None] * 20, torch.zeros(20, 2), [0.5] * 20, [[0], [0, 1]] * 10],
)
def test_targets_that_are_no_labels_are_not_taken_for_them(targets):
    dataset = Slow(20)
    dataset.targets = targets
    assert labels_of(dataset) is None
    assert len(load_data(dataset).test) == 4


def test_targets_that_are_labels_are_not_read_one_by_one():
    dataset = Slow(4)
    dataset.targets = [3, 1, 2, 0]
    assert labels_of(dataset).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("place", ["~nosuch/data", "x" * 300])
def test_a_folder_that_cannot_be_is_missing(place):
    assert "is missing" in error_of(f"imagefolder:{place}").message
