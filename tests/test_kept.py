"""The small network that comes with the package: what made it, and what its card says of it."""
import re
from dataclasses import asdict, fields
import pytest
import torch
from pixcon.config import RECIPES
from pixcon.encoder import kept_backbones, kept_weights
from pixcon.export import load_backbone
from pixcon.probe import probe_scenes
from pixcon.run import read_run, trained_backbone
from pixcon.training import build_model, configure

card = kept_weights.with_suffix('.md')
own = 'out', 'workers', 'amp'                                      # that say nothing about the result


def test_small_enough():
    assert kept_weights.stat().st_size < 150_000


def test_the_command_makes_these_names():
    "The card's command has the parameters of the file, and its network the names."
    state, config, steps = read_run('kept')
    flags = re.search(r'nbs/train.ipynb out.ipynb (.*)', card.read_text())[1].split()
    given = {name: int(v) if v.isdigit() else v for name, v in zip(flags[1::3], flags[2::3])}
    now, images = configure(**given)
    usual = {f.name: f.default for f in fields(now)}               # of parameters that came later
    theirs = usual | RECIPES[config['recipe']] | config
    assert {n: v for n, v in asdict(now).items() if n not in own} == {n: v for n, v in theirs.items() if n not in own}
    assert steps == now.epochs*(len(images)//now.batch)
    made = build_model(now).online.backbone.state_dict()
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in state.items()}


def test_all_ways_give_the_same_network():
    one, two, three = trained_backbone('kept')[0], load_backbone(kept_weights), kept_backbones()[1]
    for n, t in one.state_dict().items():
        assert torch.equal(t, two.state_dict()[n]) and torch.equal(t, three.state_dict()[n]), n


def test_random_is_the_runs_own_start():
    "The run's seed gives it; drawing it leaves everybody's random numbers alone."
    before = torch.get_rng_state()
    random, _ = kept_backbones()
    assert torch.equal(torch.get_rng_state(), before)
    _, config, _ = read_run('kept')
    torch.manual_seed(config['seed'])
    begun = build_model(configure(data='scenes', epochs=config['epochs'])[0]).online.backbone
    for n, t in begun.state_dict().items(): assert torch.equal(t, random.state_dict()[n]), n


@pytest.mark.parametrize('which', [0, 1])
def test_its_probe_is_what_the_card_says(which):
    "To half a point, which leaves room for another processor's sums."
    name = ('probe_random', 'probe_trained')[which]
    said = float(re.search(rf'\| {name} \| ([\d.]+) \|', card.read_text())[1])
    assert probe_scenes(kept_backbones()[which])['miou'] == pytest.approx(said, abs=.5)
