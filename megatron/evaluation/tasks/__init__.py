"""The recall tasks of Based and JRT as task files of lm-eval; `lm_eval --include_path megatron/evaluation/tasks` reads them."""
