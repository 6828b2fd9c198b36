"""What the demo and fine-tuning share.

Index: `flow` flow matching; `rate` the learning rate; `video` decoding; `windows` crops of a clip; `checkpoint`, `files`,
`folder` what is kept on disk; `progress` the terminal; `environment` versions and devices; `errors` what a user can put right.
Needs the extra `demo` or `finetune`; only commands import it.
"""
