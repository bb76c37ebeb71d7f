"""What forms offer is what command lines take."""

import subprocess
import sys

import pytest

from reslora_diffusion.methods.offers import offered_optimizers, offered_schedules
from reslora_diffusion.methods.optimizers import OPTIMIZERS
from reslora_diffusion.methods.schedules import parse_schedule
from reslora_diffusion.methods.schedules.settings import SCHEDULES


def test_offers_are_what_the_options_take() -> None:
    offers = offered_schedules()
    assert [offer.value for offer in offers] == list(SCHEDULES)
    assert [parse_schedule(offer.value).summary for offer in offers] == [offer.summary for offer in offers]
    assert not any(offer.reasons for offer in offers)
    assert [offer.value for offer in offered_optimizers()] == list(OPTIMIZERS)


def test_what_does_not_go_with_a_run_is_offered_with_its_reason() -> None:
    reasons = {offer.value: offer.reasons for offer in offered_schedules(["middle", "text_encoder"])}
    assert not reasons["coto"]
    assert len(reasons["prune"]) == 2
    assert "depends on activations" in reasons["restart"][0]
    for offer in offered_optimizers(["middle", "text_encoder", "dora"]):
        assert ["one lora_B" in offer.reasons[0], "magnitude" in offer.reasons[1]] == [True, True]
        assert len(offer.reasons) == 2
    assert not any(offer.reasons for offer in offered_optimizers(["block"]))


@pytest.mark.parametrize("call", ["offers import offered_schedules as made", "table import table as made"])
def test_offers_and_the_table_need_no_torch(call: str) -> None:
    code = f"import sys; from reslora_diffusion.methods.{call}; assert made() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
