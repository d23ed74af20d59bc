"""Low-rank adapters: between two of them there is no straight line while they are kept as two factors."""

from collections.abc import Collection

from lmc_curvature.errors import UnsupportedModelError, counted

# What the two factors of an update are called: by PEFT and loralib, torchtune, kohya, and diffusers.
_FACTORS = (
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_a", "lora_b"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
)


def check_adapters(moving: Collection[str]) -> None:
    """Refuse to move both factors of a low-rank update.

    The update is their product BA: halfway between two networks it is (B₁ + B₂)(A₁ + A₂)/4, and not the mean of
    their updates, (B₁A₁ + B₂A₂)/2; a factor moved in a layer of its own is no update at all. With one factor the same
    in both networks, the update moves in a straight line.

    Args:
        moving: Names of the entries that differ between the two ends.

    Raises:
        UnsupportedModelError: Both factors of an update are among them; names a pair.
    """
    pairs = factor_pairs(moving)
    if pairs:
        first, second = pairs[0]
        more = f" (and {counted(len(pairs) - 1, 'other pair')})" if len(pairs) > 1 else ""
        raise UnsupportedModelError(
            f"{first} and {second} are the factors of a low-rank update, and both move{more}: between two networks "
            "their product is not between the two updates. Merge the adapters into the weights of both networks first "
            "(model.merge_and_unload() in PEFT), and compare these."
        )


def factor_pairs(entries: Collection[str]) -> list[tuple[str, str]]:
    """The names of both factors of each low-rank update among some entries."""
    return [
        (entry, partner)
        for first, second in _FACTORS
        for entry in entries
        if (partner := entry.replace(first, second)) != entry and partner in entries
    ]
