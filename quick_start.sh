#!/usr/bin/env bash
# Set-up and training in one line: ./quick_start.sh [PRESET] [DATA] [more options of train]
# 一行命令完成安装和训练：./quick_start.sh [预设] [数据文件] [其他训练选项]
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  sed -n '2,3s/^# //p' "$0"
  exit 0
fi
preset="${1:-quick}"
[[ $# -gt 0 ]] && shift
start="$PWD"
here="$(cd "$(dirname "$0")" && pwd)"
data="$here/data/zh_sample.txt"
if [[ $# -gt 0 && "$1" != -* ]]; then
  data="$1"
  shift
fi
make --no-print-directory -C "$here" install
cd "$start"
exec "$here/.venv/bin/python" "$here/train_cli.py" --preset "$preset" --data-file "$data" "$@"
