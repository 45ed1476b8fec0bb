"""What users of such projects expect, and the test or the command that shows it here: 44 of 47, 2 in part."""
import re

from conftest import ROOT

# feature: (yes | partly | no, tests by file, or a command). What is missing stands behind "but".
FEATURES = {
    "data prep command": ("yes", "data: commands"),
    "char / byte tokenizer": ("yes", "data: decode_of_encode_is_the_text"),
    "BPE tokenizer": ("yes", "data: gpt2_is_tiktokens_own hugging_face_tokenizer"),
    "streaming of a big corpus": ("yes", "corpora: memory_stays_flat "
                                  "a_stream_gives_the_windows_of_the_whole_text"),
    "download: retry, temp name": ("yes", "data: download_survives stale_part_files"),
    "download: hash check / byte resume": ("yes", "data: download_goes_on_where_an_earlier_run_stopped"),
    "shard header + length check": ("yes", "data: verify_sees_every_flipped_byte_and_every_cut"),
    "resume": ("yes", "train: resume_with_more_steps_and_without_repeating_the_settings"),
    "resume bit-exact": ("yes", "train: resume_after_any_kill_is_bit_exact"),
    "atomic checkpoint, keep last k": ("yes", "train: death_at_every_change_of_the_file_system "
                                       "the_newest_checkpoints_stay_under_their_own_names"),
    "safe load": ("yes", "train: a_pickle_that_runs_code_is_not_run"),
    "determinism switch": ("partly", "train: resume_after_any_kill_is_bit_exact", "but no switch for a GPU"),
    "console log, ETA, progress": ("yes", "looks: a_terminal_shows_one_line_that_moves"),
    "CSV / JSONL log file": ("yes", "train: what_a_run_leaves_behind"),
    "TensorBoard": ("yes", "looks: tensorboard_shows_the_log"),
    "wandb": ("yes", "looks: wandb_gets_the_numbers_of_the_log_and_may_fail"),
    "loss plot without extra tools": ("yes", "bench: a_picture_is_the_same_bytes_and_shows_every_run"),
    "LR: cosine + warmup / WSD": ("yes", "train: learning_rate"),
    "grad accumulation / clipping": ("yes", "train: accumulated_gradients_are_the_big_batch"),
    "AMP bf16/fp16": ("yes", "train: bf16_on_a_cpu_is_near_fp32"),
    "gradient checkpointing": ("yes", "--gradient_checkpointing"),
    "torch.compile, automatic fallback": ("yes", "train: a_failing_compiler_is_said_aloud"),
    "DDP via torchrun": ("yes", "distributed: two_processes_take_the_steps_of_one"),
    "FSDP": ("yes", "distributed: sharing_out_the_model_changes_no_step"),
    "KV cache": ("yes", "cache: decoding_is_the_full_forward_of_rounded_numbers"),
    "top-k / top-p / min-p": ("yes", "speculation: sampled_text_has_the_models_distribution"),
    "stop tokens or strings": ("yes", "sample: a_stop_string_is_never_shown"),
    "token streaming, UTF-8 safe": ("yes", "sample: half_characters_wait"),
    "interactive chat": ("yes", "speculation: a_conversation_reads_no_token_twice"),
    "batch sampling": ("yes", "speculation: prompts_of_different_lengths_write_what_each_writes_alone"),
    "speculative decoding": ("yes", "speculation: sampled_text_has_the_models_distribution"),
    "HF weight import / export": ("yes", "weights: there_and_back a_checkpoint_of_transformers"),
    "safetensors": ("yes", "weights: shards_and_a_pickle"),
    "GGUF": ("yes", "python llama.cpp/convert_hf_to_gguf.py"),
    "benchmark tasks": ("yes", "eval: multiple_choice_is_that_of_brute_force"),
    "quantization": ("no", "but of the cache: cache_dtype"),
    "tokens/s, MFU": ("yes", "train: what_a_run_leaves_behind"),
    "peak memory report / forecast": ("yes", "memory: the_forecast_is_within_15_percent_of_the_peak"),
    "inference bench (latency, MBU, JSON)": ("yes", "sample: bench_ends_with_json "
                                             "the_suites_for_a_gpu_run_dry "
                                             "prompts_in_a_file_and_what_json_says_of_each"),
    "size presets": ("yes", "train: model_size_is_below_everything_given"),
    "hooks / ablation switches": ("yes", "readme: readmes_own_hook_runs"),
    "config dump": ("yes", "train: what_a_run_leaves_behind"),
    "run metadata": ("yes", "train: what_a_run_leaves_behind"),
    "sweep to one ablation table": ("yes", "bench: one_command_trains_pairs_and_compares"),
    "preflight check command": ("partly", "data: commands", "but no single command for all"),
    "NaN / spike guard": ("yes", "train: a_non_finite_batch_is_skipped a_spike_is_skipped"),
    "SIGTERM saves; Ctrl-C saves": ("yes", "train: a_signal_saves_and_resume_goes_on"),
}


def test_each_feature_has_what_shows_it():
    texts = "".join((ROOT / name).read_text(encoding="utf-8")
                    for name in ("README.md", "bench_results/README.md", "tests/test_model.py"))
    for feature, (state, shown, *_) in FEATURES.items():
        file, colon, names = shown.partition(": ")
        if not colon or state == "no":
            assert state == "no" or shown.strip("-") in texts, feature
            continue
        text = (ROOT / f"tests/test_{file}.py").read_text(encoding="utf-8")
        assert {f"test_{name}" for name in names.split()} <= {*re.findall(r"^def (\w+)", text, re.M)}, feature
    states = [state for state, *_ in FEATURES.values()]
    assert len(states) == 47 and states.count("yes") >= 42
