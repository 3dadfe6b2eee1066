"""Take the guards against the traps out, one at a time, and see tests fail.

    python tests/mutants.py [WORD ...]      only removals whose trap, file or text holds one of the words

Each removal is made in a copy of the tree, never here. It is killed if one of its tests fails. It is at fault, as one
that survives is, if its text is not in the file exactly once (stale), or if the tests can't run with it (broken).
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("peft_engine", "kernels", "tests", "benchmarks", "configs", "pyproject.toml")
WORKERS = 2
LIMIT_SECONDS = 240
# what the tests import and no removal touches: loaded once, every run of the tests starts from there
PRELOADED = ["pytest", "datasets", "peft", "rich.console", "scipy.stats", "sklearn.metrics", "sklearn.model_selection"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "qwen2")]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # bytecode of a file that changes twice within a second would be taken for new
}


@dataclass(frozen=True)
class Removal:
    """A guard taken out.

    Args:
        trap: its number.
        file: below peft_engine/.
        old: text that is there exactly once.
        new: what stands in its place.
        tests: names of the functions in test_traps.py of which one must fail, without `test_trap_NN_`.
    """

    trap: str
    file: str
    old: str
    new: str
    tests: str

    def paths(self) -> list[str]:
        return [f"tests/test_traps.py::test_trap_{self.trap}_{name}" for name in self.tests.split()]

    def __str__(self) -> str:
        return f"{self.trap} {self.file}: {' '.join(self.old.split())[:70]}"


R = Removal
REMOVALS = (
    # 1: every micro-batch has a mean of its own; rows for tokens; means in place of sums
    R("01", "training/step.py", "loss = task.training_loss(group.model, batch) / units",
      'loss = task.training_loss(group.model, batch) / (batch["labels"][:, 1:] != -100).sum() / len(micro_batches)',
      "accumulation_equals_one_big_batch"),
    R("01", "training/loop.py", "units = self.data.units[rows].sum().item()", "units = len(rows)",
      "loss_is_the_mean_over_all_supervised_tokens"),
    R("01", "tasks/causal_lm.py", "use_cache=False, num_items_in_batch=1).loss", "use_cache=False).loss",
      "accumulation_equals_one_big_batch"),
    R("01", "tasks/weighting.py", 'F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")',
      'F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="mean")', "uneven_micro_batches_of_a_classifier"),
    # 2
    R("02", "data/encoding.py", "if encoded.dropped and (share > max_dropped or not len(encoded)):", "if False:",
      "no_supervised_token_is_refused_and_shown"),
    R("02", "data/encoding.py", " or not len(encoded)):", "):", "also_where_any_share_may_be_dropped"),
    R("02", "tasks/causal_lm.py", "rows = [row for row in rows if row.units]", "rows = list(rows)",
      "no_supervised_token_is_refused_and_shown"),
    R("02", "data/chat.py", "    if not learned:\n", "    if not turns:\n",
      "conversations_of_which_nothing_is_to_be_learned"),
    R("02", "inspection.py", "task.fingerprint(), None, cache)", "task.fingerprint(), 1.0, cache)",
      "no_supervised_token_is_refused_and_shown"),
    # 3
    R("03", "tasks/causal_lm.py", "rows = [row for row in rows if row.units]", "rows = list(rows)",
      "rows_that_truncation_empties_are_dropped_and_counted"),
    R("03", "data/encoding.py", "dropped.append((i, found))", "pass",
      "rows_that_truncation_empties_are_dropped_and_counted"),
    R("03", "data/encoding.py", "(share > max_dropped or not len(encoded))", "not len(encoded)",
      "above_a_share_the_run_is_refused"),
    # 4: padding found by its id
    R("04", "tasks/base.py", "torch.from_numpy(mask.astype(np.int64))",
      "torch.from_numpy((ids != fill).astype(np.int64))", "eos_is_learned_and_seen_where_it_is_the_padding_too"),
    R("04", "tasks/causal_lm.py", "labels[line, : len(taught)][taught] = data.tokens(int(row))[taught]",
      "labels[line, : len(taught)][taught] = data.tokens(int(row))[taught]\n"
      "            labels[line][labels[line] == padding_id(self.tokenizer)] = IGNORED",
      "eos_is_learned_and_seen_where_it_is_the_padding_too"),
    R("04", "generation.py",
      "mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)",
      "mask = (ids != fill).long()", "generation_sees_the_end_of_earlier_turns"),
    R("04", "tasks/text_classification.py", "weight = attention_mask.unsqueeze(-1).to(hidden.dtype)",
      "weight = torch.ones_like(attention_mask).unsqueeze(-1).to(hidden.dtype)", "padding_does_not_change_a_class"),
    # 5
    R("05", "data/chat.py", "end = match.end()", "pass", "the_token_that_ends_a_turn_is_learned"),
    R("05", "data/chat.py", "text[start:].rstrip() + tokenizer.eos_token", "text[start:].rstrip()",
      "the_token_that_ends_a_turn_is_learned"),
    R("05", "data/chat.py", "[(0, len(text.rstrip()))]", "[(0, len(text))]", "also_where_everything_is_learned"),
    R("05", "tasks/causal_lm.py", 'end = self.tokenizer.eos_token or ""', 'end = ""',
      "completions_and_documents_end_in_eos"),
    R("05", "tasks/causal_lm.py", "[*supervised, True]", "[*supervised, False]",
      "completions_and_documents_end_in_eos"),
    R("05", "tasks/causal_lm.py", "check_stop_token(self.tokenizer, ids, supervised, where)", "pass",
      "what_nothing_can_end_is_refused"),
    # 6: the last two make the guards too strict
    R("06", "levers/checkpointing.py", 'model.gradient_checkpointing_enable({"use_reentrant": False})', "pass",
      "gradient_checkpointing_trains_as_without"),
    R("06", "training/guards.py", "strict=True) if not there]", "strict=True) if False]",
      "adapters_that_the_task_does_not_use_are_refused"),
    R("06", "training/guards.py", "strict=True) if not there]", "strict=True) if False]",
      "checkpointing_that_cuts_gradients_off_is_refused"),
    R("06", "training/loop.py", "                check_gradients(trainee.member, found.reached)",
      "                pass", "adapters_that_the_task_does_not_use_are_refused"),
    R("06", "training/guards.py", "and not bool(tensor.detach().any())]", "and False]",
      "adapters_that_never_move_are_refused"),
    R("06", "training/loop.py", 'check_moving(trainee.member, self.config.adapter.init == "default")', "pass",
      "adapters_that_never_move_are_refused"),
    R("06", "training/guards.py", "[t.grad is not None for t", "[t.grad is not None and bool(t.grad.any()) for t",
      "no_false_alarm"),
    R("06", "training/loop.py", "check_gradients(trainee.member, found.reached)", "check_gradients(trainee.member)",
      "several_processes_hide_no_dead_tensor"),
    R("06", "training/loop.py", "if updated and trainee.updates == 2:", "if step == 1:", "no_false_alarm"),
    # 7
    R("07", "adapters/sharding.py", "fully_shard(block, mesh=mesh, ignored_params=kept)",
      "fully_shard(block, mesh=mesh)", "a_sharded_run_saves_whole_adapters"),
    # 8: samples run on in a pack; each guard alone
    R("08", "data/packing.py", "positions[line, start : start + len(sample)] = np.arange(len(sample))",
      "positions[line, start : start + len(sample)] = start + np.arange(len(sample))",
      "packed_samples_are_learned_as_unpacked_ones"),
    R("08", "tasks/causal_lm.py", "    taught[:1] = False\n", "", "a_first_token_is_never_learned"),
    R("08", "training/isolation.py", "if not moved <= (NARROW_MOVED if narrow else MOVED):", "if False:",
      "a_model_whose_samples_see_each_other_is_refused"),
    R("08", "training/isolation.py", "if not alone <= (NARROW_ALONE if narrow else ALONE):", "if False:",
      "positions_that_go_on_are_refused"),
    R("08", "building.py", "            prove_isolation(group, member, task, runtime)", "            pass",
      "a_model_whose_samples_see_each_other_is_refused"),
    # 9
    R("09", "training/isolation.py", 'if getattr(model, "_is_stateful", False):', "if False:",
      "models_with_a_running_state_are_refused"),
    R("09", "training/isolation.py", "sorted({str(kind) for kind in kinds} - set(ATTENDING))", "[]",
      "models_with_a_running_state_are_refused"),
    # 10
    R("10", "training/loop.py", "seed_everything(trainee.member.spec.seed, 3, step, self.runtime.rank)", "pass",
      "resume_repeats_and_skips_no_sample"),
    R("10", "data/batching.py", "np.random.default_rng([self.seed, epoch])", "np.random.default_rng()",
      "resume_repeats_and_skips_no_sample"),
    R("10", "training/checkpoint.py", "trainee.optimizer.load_state_dict(optimizer)", "pass",
      "resume_repeats_and_skips_no_sample"),
    R("10", "training/checkpoint.py", 'trainee.restore(saved["trainee"])', "pass",
      "resume_repeats_and_skips_no_sample"),
    R("10", "training/state.py", '        "window",\n', "", "resume_repeats_and_skips_no_sample"),
    R("10", "run_directory.py", 'if row["step"] <= step:', "if True:", "resume_repeats_and_skips_no_sample"),
    # 11
    R("11", "training/checkpoint.py", 'if found[key] != expected.get(key)]', "if False]",
      "every_restored_tensor_is_compared"),
    R("11", "training/checkpoint.py", "tensor.copy_(tensors[key])", "pass", "the_adapter_is_restored"),
    R("11", "training/checkpoint.py", "digest_file(path) != digest", "False", "altered_files_are_refused"),
    R("11", "training/checkpoint.py", "manifest = verify_files(checkpoint)", "manifest = _read_manifest(checkpoint)",
      "altered_files_are_refused missing_files_are_refused"),
    # 12
    R("12", "drift.py", "        if not self.within():\n", "        if False:\n", "a_merge_that_drifts_is_refused"),
    R("12", "export_run.py", "        best.apart.refuse()\n", "", "a_merge_that_drifts_is_refused"),
    R("12", "export_run.py", "MAX_KL if max_kl is None else max_kl", "MAX_KL", "the_bound_is_the_users"),
    R("12", "export_run.py", "    opened = open_run(path, overrides)\n    task, config, bound",
      "    opened = open_run(path, (*overrides, *IN_FULL))\n    task, config, bound",
      "a_rounded_run_is_merged_onto_its_own_weights_and_says_how_far_it_is"),
    R("12", "export_run.py", "return open_run(path, (*overrides, *IN_FULL))", "return open_run(path, overrides)",
      "a_rounded_run_is_merged_onto_its_own_weights_and_says_how_far_it_is"),
    # 13
    R("13", "exporting.py", "if not drift.relative <= bound:", "if False:",
      "a_merge_that_is_not_what_was_trained_is_refused"),
    R("13", "exporting.py", "layer.weight = nn.Parameter(layer.weight.detach().clone())", "pass",
      "tied_embeddings_survive_the_merge"),
    R("13", "adapters/methods.py", "model.config.tie_word_embeddings = False", "pass",
      "tied_embeddings_survive_the_merge"),
    # 14
    R("14", "adapters/files.py", "if wrong or len(written) != len(tensors) or not tensors:", "if False:",
      "a_file_without_the_head_is_noticed"),
    R("14", "adapters/files.py", "        if lost:\n", "        if False:\n",
      "a_head_that_peft_would_not_save_is_noticed"),
    R("14", "adapters/files.py", "set_peft_model_state_dict(model, tensors, adapter_name=spec.name)", "pass",
      "every_trained_tensor_comes_back"),
    R("14", "adapters/files.py", "parameter.copy_(tensors[name])", "pass", "every_trained_tensor_comes_back"),
    R("14", "adapters/targets.py", "sorted({*asked, *backbone.new_modules})", "sorted({*asked})",
      "every_trained_tensor_comes_back"),
    # 15
    R("15", "adapters/files.py", 'faults = [f"missing {name}" for name in here if name not in found]', "faults = []",
      "an_adapter_that_does_not_fit_is_refused"),
    R("15", "adapters/files.py", 'faults += [f"unexpected {name}" for name in found if name not in here]', "pass",
      "an_adapter_that_does_not_fit_is_refused"),
    R("15", "adapters/files.py", "if name in found and found[name].shape != here[name].shape", "if False",
      "an_adapter_that_does_not_fit_is_refused"),
    R("15", "adapters/files.py", "refuse_difference(_file_tensors(model, spec.name), tensors, str(folder / WEIGHTS))",
      "pass",
      "an_adapter_that_does_not_fit_is_refused"),
    R("15", "adapters/files.py", "refuse_difference(member.tensors, tensors, str(folder / WEIGHTS))", "pass",
      "an_adapter_that_does_not_fit_is_refused"),
    # 17
    # 16: no adapter on the head; the pretrained head for the trained copy
    R("16", "adapters/fusing/loss.py", "return base.weight, base.bias, adapters", "return base.weight, base.bias, []",
      "the_fused_loss_sees_an_adapter_on_the_head"),
    R("16", "adapters/fusing/loss.py", "copies[active] if active in copies else head.original_module",
      "head.original_module", "the_fused_loss_sees_an_adapter_on_the_head"),
    # 27: every adapter for the active ones; disabled and merged ones run
    R("27", "adapters/fusing/linears.py", "        for name in self.active_adapters:",
      "        for name in self.lora_A:",
      "disabled_switched_and_merged_adapters_are_honoured"),
    R("27", "adapters/fusing/linears.py", "if name not in self.lora_A:", "if name != self.active_adapters[0]:",
      "disabled_switched_and_merged_adapters_are_honoured"),
    R("17", "adapters/lora.py", "tensor.data = tensor.data.float()", "pass",
      "small_updates_of_a_bf16_backbone_are_kept"),
    R("17", "adapters/methods.py", "parameter.data = parameter.data.float()", "pass",
      "small_updates_of_a_bf16_backbone_are_kept"),
    R("17", "adapters/files.py", "    member_of(model, spec)  # in fp32", "    # in fp32",
      "what_was_trained_can_be_used"),
    R("17", "generation.py", "enabled=len(dtypes) > 1", "enabled=False", "what_was_trained_can_be_used"),
    R("17", "building.py", 'if narrow and own and runtime.precision == "fp32":', "if False:",
      "dtypes_that_do_not_mix_are_refused"),
    R("17", "building.py", 'if split and runtime.device.type == "cpu":', "if False:",
      "dtypes_that_do_not_mix_are_refused"),
    # 18
    R("18", "data/chat.py", "if bos is not None and input_ids[:2] == [bos, bos]:", "if False:",
      "two_bos_are_refused a_template_that_prints_two_is_refused"),
    R("18", "tasks/causal_lm.py", "add_special_tokens=add_special)", "add_special_tokens=True)", "one_bos"),
    R("18", "generation.py", '"the prompt", not flag)', '"the prompt", True)', "generation_starts_with_one"),
    R("18", "data/chat.py", "while add_special_tokens and len(offsets) > 1 and tuple(offsets[-1]) == (0, 0):",
      "while False:", "generation_starts_with_one"),
    # 19
    R("19", "tasks/causal_lm.py", '            "tokenizer": digest_tokenizer(self.tokenizer),\n', "",
      "the_cache_is_found_by_content"),
    R("19", "tasks/causal_lm.py", '            "max_length": data.max_length,\n', "", "the_cache_is_found_by_content"),
    R("19", "tasks/causal_lm.py", '            "supervise": data.supervise,\n', "", "the_cache_is_found_by_content"),
    R("19", "backbone.py", "template = json.dumps(tokenizer.chat_template, sort_keys=True)", 'template = ""',
      "the_cache_is_found_by_content"),
    R("19", "data/encoding.py", "    for example in split.examples:\n", "    for example in split.examples[:0]:\n",
      "the_cache_is_found_by_content"),
    R("19", "data/encoding.py", 'if notes.pop("digest", None) != _digest(arrays, notes):',
      'if notes.pop("digest", None) is None:', "a_damaged_cache_is_written_anew"),
    R("19", "tasks/text_classification.py", '            "labels": self.labels.to_json(),\n', "",
      "labels_are_part_of_the_key"),
    # 20
    R("20", "training/loop.py", "settings.warmup, self.total_steps)",
      "settings.warmup, self.total_steps * self.runtime.world)", "the_schedule_counts_optimizer_steps"),
    R("20", "training/loop.py", "self._advance(trainee, step, schedule(step))",
      "self._advance(trainee, step, schedule(step * self.runtime.world))", "the_schedule_counts_optimizer_steps"),
    # 21
    R("21", "adapters/targets.py",
      'if not any(_ends_with(name, ending) for name in names):\n            raise _nothing("adapter.targets"',
      'if not names:\n            raise _nothing("adapter.targets"', "a_name_that_matches_nothing_is_refused"),
    R("21", "adapters/targets.py", "    if not found:\n        raise _nothing(",
      "    if not names:\n        raise _nothing(",
      "a_name_that_matches_nothing_is_refused"),
    R("21", "adapters/targets.py", "if layer not in there:", "if False:", "a_name_that_matches_nothing_is_refused"),
    R("21", "adapters/targets.py", "if not any(matches_pattern(pattern, name) for name in found):", "if False:",
      "a_name_that_matches_nothing_is_refused"),
    R("21", "adapters/targets.py",
      'if not any(_ends_with(name, ending) for name in names):\n            raise _nothing("adapter.modules_to_save"',
      'if not names:\n            raise _nothing("adapter.modules_to_save"', "a_name_that_matches_nothing_is_refused"),
    # 22: the last makes the guard too strict
    R("22", "backbone.py", "wrong = [name for name in new if not may_be_new(model, name)]", "wrong: list[str] = []",
      "pretrained_tensors_that_would_start_at_random_are_refused"),
    R("22", "backbone.py", 'new = sorted({*info["missing_keys"], *mismatched})', 'new = sorted(info["missing_keys"])',
      "pretrained_tensors_that_would_start_at_random_are_refused"),
    R("22", "tasks/heads.py", 'return not name.startswith(f"{model.base_model_prefix}.")', "return True",
      "also_under_a_new_head"),
    R("22", "tasks/text_classification.py", 'return name.startswith("pooler.")', "return True",
      "also_under_a_new_head"),
    R("22", "tasks/heads.py", 'return not name.startswith(f"{model.base_model_prefix}.")',
      "return False", "a_new_head_is_accepted_and_an_old_one_kept"),
    # 23
    R("23", "tasks/causal_lm.py", "self.nats, self.right = self.nats + nats, self.right + right",
      "self.nats, self.right = self.nats + nats, self.right + right\n"
      '        self.__dict__.setdefault("kept", []).append(logits)', "evaluation_keeps_no_logits"),
    R("23", "tasks/class_metrics.py", "self.predicted.append(predicted)",
      'self.predicted.append(predicted)\n        self.__dict__.setdefault("kept", []).append(logits)',
      "evaluation_keeps_no_logits"),
    R("23", "evaluation.py", "with torch.no_grad(), runtime.accelerator.autocast():",
      "with runtime.accelerator.autocast():", "evaluation_builds_no_graph"),
    # 25
    R("25", "training/loop.py", "if math.isfinite(loss) and (math.isfinite(norm) or scaled):", "if True:",
      "at_the_first_step_there_is_nothing_to_keep"),
    R("25", "training/loop.py", "(math.isfinite(norm) or scaled)", "True",
      "a_gradient_that_is_not_finite_stops_it_too"),
    R("25", "training/loop.py", "self._save(trainee.step)", "pass",
      "nan_stops_the_run_with_the_last_good_weights"),
    R("25", "training/loop.py", "self._refuse_not_finite(trainee, step, loss, norm, early",
      "self._update(trainee)\n            self._refuse_not_finite(trainee, step, loss, norm, early",
      "nan_stops_the_run_with_the_last_good_weights"),
    R("25", "training/guards.py", "if not torch.isfinite(task.loss(logits, batch)):", "if True:",
      "a_gradient_that_is_not_finite_stops_it_too nan_stops_the_run_with_the_last_good_weights"),
    R("25", "session.py", 'self.directory.write_json("failure.json", record)', "None",
      "at_the_first_step_there_is_nothing_to_keep"),
    # 26
    R("26", "data/splitting.py", "        if not hits:\n            kept.append(i)\n",
      "        kept.append(i)\n        if not hits:\n            pass\n",
      "rows_of_given_splits_leave_training"),
    R("26", "data/duplicates.py", "return given.strip()", "return given",
      "rows_of_given_splits_leave_training made_splits_keep_duplicates_on_one_side"),
    R("26", "data/splitting.py", "groups.setdefault(input_key(example), [])", "groups.setdefault(str(i), [])",
      "made_splits_keep_duplicates_on_one_side"),
    R("26", "data/splitting.py", "report.near[near.split] = report.near.get(near.split, 0) + 1", "pass",
      "rows_of_given_splits_leave_training"),
)  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    chosen = [r for r in REMOVALS if not words or any(w in str(r) or w in r.tests for w in words)]
    if not chosen:
        print(f"No removal holds any of {words}.")
        return 1
    stale = [r for r in chosen if (ROOT / "peft_engine" / r.file).read_text(encoding="utf-8").count(r.old) != 1]
    for removal in stale:
        print(f"stale     {removal}")
    began = time.monotonic()
    os.environ.update(SETTINGS)
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copies: Queue[Path] = Queue()
        for number in range(WORKERS):
            copies.put(copy_tree(Path(place) / str(number)))
        every = sorted({path for removal in chosen for path in removal.paths()})
        if run_tests(copies.queue[0], every, 3 * LIMIT_SECONDS) != "survived":
            said = (copies.queue[0] / "out.txt").read_text()
            print(said if len(said) < 6000 else f"{said[:3000]}\n…\n{said[-3000:]}")
            print("The tests fail, or can't run, with every guard in place.")
            return 1

        def judge(removal: Removal) -> str:
            copy = copies.get()
            try:
                return try_removal(removal, copy)
            finally:
                copies.put(copy)

        fresh = [removal for removal in chosen if removal not in stale]
        results = []
        with ThreadPoolExecutor(WORKERS) as pool:
            for removal, result in zip(fresh, pool.map(judge, fresh), strict=True):
                print(f"{result:<9} {removal}", flush=True)
                results.append(result)
    killed = results.count("killed")
    print(f"killed {killed}/{len(chosen)} in {time.monotonic() - began:.0f} s")
    return 0 if killed == len(chosen) else 1


def copy_tree(target: Path) -> Path:
    target.mkdir()
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def try_removal(removal: Removal, copy: Path) -> str:
    """killed, survived or broken; the copy is put right again."""
    path = copy / "peft_engine" / removal.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(removal.old, removal.new), encoding="utf-8")
    try:
        return run_tests(copy, removal.paths(), LIMIT_SECONDS)
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(copy: Path, paths: list[str], limit: float) -> str:
    """pytest in a process of its own: killed where a test fails, survived where none does, else broken."""
    process = multiprocessing.get_context("forkserver").Process(target=pytest_in, args=(copy, paths))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    return {0: "survived", 1: "killed"}.get(process.exitcode if process.exitcode is not None else -1, "broken")


def pytest_in(copy: Path, paths: list[str]) -> None:
    """Run tests of a copy of the tree, with that copy's engine; what they print goes to its out.txt."""
    out = os.open(copy / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    roots = [str(copy), str(copy / "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)  # for processes that tests start
    sys.path[:0] = roots
    sys.dont_write_bytecode = True
    os.chdir(copy)
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}", *paths])
    import peft_engine

    if not Path(peft_engine.__file__).is_relative_to(copy):
        code = pytest.ExitCode.INTERNAL_ERROR  # not the copy was tested
    sys.exit(int(code))


if __name__ == "__main__":
    sys.exit(main())
