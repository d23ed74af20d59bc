from benchmarks.support import options

SIZES = {"full": {"network": "resnet20", "batch": 8, "width": 4}, "quick": {"network": "resnet8", "batch": 2}}


def test_the_command_is_kept_without_folders(tmp_path):
    words = ["--quick", "--out", str(tmp_path), "--batch", "3"]
    found = options.parse_options("folder/hvp.py", "doc", words, options.add_network)
    assert found.command == "python -m benchmarks.hvp --quick --batch 3"
    assert (found.script, found.size, found.out) == ("hvp", "quick", tmp_path)
    assert options.chosen_size(found, SIZES) == {"network": "resnet8", "batch": 3}


def test_torchvisions_network_has_a_width_of_its_own():
    found = options.parse_options("hvp.py", "doc", ["--network", "resnet18"], options.add_network)
    assert options.chosen_size(found, SIZES) == {"network": "resnet18", "batch": 8}
