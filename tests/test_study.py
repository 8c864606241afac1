"""Many runs in one table: what is run, how it goes on, and what is said about it."""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from pixcon.run import read_log
from pixcon.study import (add_rows, all_results, configure_study, in_words, jobs, look_at_matches, paired_difference,
                          random_weights, read_study, run_of, run_study, study_tests, summary_table, trained,
                          variant_parameters, variant_title, verdict)

ROOT = Path(__file__).parent.parent
RUNS = dict(data='scenes', scenes=16, batch=8, size=32, hidden=16, dim=8, queue=16, amp='off', workers=0,
            save_minutes=0, log_steps=1)
STUDY = dict(variants='moco sr@0.5', budgets='2 3', seeds=2, probe='scenes@32x32', scores='linear')


@pytest.mark.parametrize('word', ['rs', '', 'sr@', 'sr@2', 'sr@-.1', 'sr@late', 'moco@.3', 'random'])
def test_words_that_are_no_variant(word):
    with pytest.raises(ValueError, match='unknown method|from 0 to 1'): variant_parameters(word)


@pytest.mark.parametrize('wrong,message', [
    (dict(budgets='60 many'), 'whole numbers of epochs'), (dict(budgets='0'), 'whole numbers of epochs'),
    (dict(budgets=''), 'whole numbers of epochs'), (dict(scores='knnn'), "did you mean 'knn'"),
    (dict(variants='moco srr'), "did you mean 'sr'"), (dict(seeds=0), 'seeds must be at least 1'),
    (dict(variant='sr'), "did you mean 'variants'"), (dict(probe='scenes@32'), 'scenes@360x480'),
    (dict(probe='/no/such/folder'), 'is no folder')])
def test_wrong_parameter(tmp_path, wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study_tests(configure_study(**{'out': tmp_path, **wrong}))


def test_a_late_variant_has_its_own_runs(tmp_path):
    "Start of the dense loss and title follow the word, and nothing of the recipe's own start is left."
    config = configure_study(out=tmp_path, variants='sr sr@.25', budgets='4')
    starts = {job: run_of(config, job, RUNS).config for job in jobs(config)}
    assert {job[0]: c.dense_start for job, c in starts.items() if job[0] != 'random'} == {'sr': 0, 'sr@.25': .25}
    assert len({c.out for c in starts.values()}) == 3
    assert variant_title('sr@.25') == 'PixCon-SR, dense loss from 25 %'


def scored(*values, variant='sr', epochs=8, task='knn', score='miou'):
    "Lines of a table, a seed for each value."
    rows = [dict(data='scenes', backbone='tiny', variant=variant, epochs=epochs, steps=10*epochs, seconds=1,
                 seed=seed, task=task, score=score, value=v) for seed, v in enumerate(values) if v is not None]
    return pd.DataFrame(rows)


def test_difference_by_hand():
    "Seed by seed: 1, 2, 3; all 27 means of three draws lie from 1 to 3, the middle 95 % too."
    base, other = (scored(*v).set_index('seed')['value'] for v in ((40, 50, 60), (41, 52, 63)))
    d = paired_difference(other, base)
    assert (d['difference'], d['pairs']) == (2, 3)
    assert 1 <= d['low'] < 4/3 and 8/3 < d['high'] <= 3
    assert paired_difference(other, base) == d                     # the bootstrap is seeded
    alike = paired_difference(base + 2, base)
    assert (alike['low'], alike['high']) == (2, 2)
    few = paired_difference(other[:2], base)
    assert few['pairs'] == 2 and math.isnan(few['low'])
    assert math.isnan(paired_difference(other, base[:0])['difference'])


@pytest.mark.parametrize('values,words', [
    ((41, 52, 63), 'is at 52.0, 2.0 above MoCo-v2+ (95 % interval +1'),
    ((39, 48, 57), 'is at 48.0, 2.0 below MoCo-v2+ (95 % interval -3'),
    ((41, 48, 63), 'but the order does not show'),
    ((40, 52, 63), 'but the order does not show'),                 # the interval begins at zero
    ((41, 52), '1.5 above MoCo-v2+: 2 of the 3 seeds needed'),
    ((None, None, None, 45), 'no seed in common')])
def test_words_follow_the_rule(values, words):
    table = pd.concat([scored(40, 50, 60, variant='moco'), scored(*values)])
    said, = verdict(table, 'knn')
    assert words in said


def test_budgets_are_compared_with_their_own():
    "Each budget with MoCo-v2+ of that budget; random weights and other scores stay out."
    table = pd.concat([scored(20, variant='random', epochs=0), scored(40, variant='moco'), scored(43),
                       scored(60, variant='moco', epochs=16), scored(61, epochs=16), scored(1, score='pck'),
                       scored(7, variant='sr@0.3', epochs=16)])
    rows = summary_table(table, 'knn')
    assert rows['variant'].tolist() == ['random', 'moco', 'sr', 'moco', 'sr', 'sr@0.3']
    assert rows['difference'].fillna(0).tolist() == [0, 0, 3, 0, 1, -53]
    assert len(verdict(table, 'knn')) == 3


def timeless(folder):
    "A study's table without times, in order."
    table = read_study(folder).drop(columns='seconds')
    return table.sort_values(['variant', 'epochs', 'seed', 'task', 'score']).reset_index(drop=True)


ALONE = '''
import json, sys
import torch
from pixcon.study import configure_study, run_study, study_tests
torch.set_num_threads(1)
config = configure_study(**json.loads(sys.argv[1]))
run_study(config, json.loads(sys.argv[2]), study_tests(config))
'''


def test_killed_and_continued(tmp_path):
    """Killed in the middle of the third run, then finished by the notebook: the table of a study that was never stopped.

    Floats are equal because threads and precision are."""
    environment = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PIXCON_DATA')}
    environment |= dict(OMP_NUM_THREADS='1')
    killed = STUDY | dict(out=str(tmp_path/'killed'))
    child = subprocess.Popen([sys.executable, '-c', ALONE, json.dumps(killed), json.dumps(RUNS)], env=environment)
    third = tmp_path/'killed'/'runs'/'moco-3ep-seed0'/'log.jsonl'
    until = time.time() + 120
    while not third.exists() and time.time() < until: time.sleep(.01)
    child.kill()
    child.wait()
    before = timeless(tmp_path/'killed')
    assert 0 < len(before) < 80 and not (tmp_path/'killed'/'runs'/'sr@0.5-3ep-seed1').exists()
    flags = [a for n, v in (killed | RUNS).items() for a in ('-p', n, str(v))]
    command = ['papermill', ROOT/'nbs'/'study.ipynb', 'out.ipynb', '--no-progress-bar', *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = STUDY | dict(out=str(tmp_path/'whole'))
    subprocess.run([sys.executable, '-c', ALONE, json.dumps(whole), json.dumps(RUNS)], env=environment, check=True)
    pd.testing.assert_frame_equal(timeless(tmp_path/'killed'), timeless(tmp_path/'whole'))
    assert len(timeless(tmp_path/'killed')) == 2*(1 + 2*2)*(1 + 6)
    said = ''.join(str(c.get('outputs')) for c in nbformat.read(tmp_path/'out.ipynb', 4).cells if c.cell_type == 'code')
    assert '2 of the 3 seeds needed to tell' in said and 'complete' in said


def test_time_is_over_in_the_middle_of_a_run(tmp_path, monkeypatch):
    "The run is saved where it stops, has no score, and is the same in the end as one that was not stopped."
    config = configure_study(out=tmp_path/'cut', **STUDY)
    job = 'sr@0.5', 3, 0
    training = run_of(config, job, RUNS)
    step = training.train_step
    def last_step(parts):
        out = step(parts)
        if training.run.step == 4: monkeypatch.setattr('pixcon.training.time.time', lambda: math.inf)
        return out
    training.train_step = last_step
    assert trained(training, time.time() + 600) is None and training.run.step == 4
    monkeypatch.undo()
    backbone = trained(run_of(config, job, RUNS))
    other = trained(run_of(configure_study(out=tmp_path/'whole', **STUDY), job, RUNS))
    for n, t in other.state_dict().items(): assert backbone.state_dict()[n].equal(t), n
    assert [line['step'] for line in read_log(tmp_path/'cut'/'runs'/'sr@0.5-3ep-seed0')] == [1, 2, 3, 4, 5, 6]


def test_random_weights_are_the_runs_own(tmp_path):
    "Of the seed, and scored once for all methods."
    config = configure_study(out=tmp_path, **STUDY)
    training = run_of(config, ('sr', 2, 1), RUNS)
    begun = {n: t.clone() for n, t in training.model.online.backbone.state_dict().items()}
    for n, t in random_weights(training.config).state_dict().items(): assert t.equal(begun[n]), n
    found = look_at_matches(random_weights(training.config), training.images, 32, .25, n=8)
    assert 0 < found['match_true'] <= 1 and found == look_at_matches(
        random_weights(training.config), training.images, 32, .25, n=8)


def test_finished_lines_need_no_runs(tmp_path):
    "A table that came without its run folders is complete; another parameter of the runs is refused."
    config = configure_study(out=tmp_path, variants='moco', budgets='2', seeds=1)
    for variant, epochs in (('random', 0), ('moco', 2)):
        about = dict(data='built-in scenes', backbone='b', variant=variant, epochs=epochs, steps=4, seconds=1, seed=0)
        add_rows(tmp_path, about, 'matches', dict(match_true=.5))
        add_rows(tmp_path, about, 'linear scenes', dict(miou=30.))
    assert run_study(config, RUNS, {'linear scenes': None}, show=pytest.fail)
    assert not (tmp_path/'runs').exists()
    with pytest.raises(ValueError, match='size 32, now 48'): run_study(config, RUNS | dict(size=48), {})
    assert len(all_results(tmp_path)) == 2


def test_tables_that_are_none(tmp_path):
    (tmp_path/'study.csv').write_text('epochs,value\n1,2\n')
    with pytest.raises(ValueError, match='is no table of a study: it has no data'): read_study(tmp_path)
