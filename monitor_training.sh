#!/usr/bin/env bash
# Watch a training on one screen: ./monitor_training.sh [DIR] [more options of holdfast monitor]
# 在一屏上监视训练：./monitor_training.sh [目录] [其他选项]
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
if [[ -x "$here/.venv/bin/holdfast" ]]; then
  exec "$here/.venv/bin/holdfast" monitor "$@"
elif command -v holdfast >/dev/null; then
  exec holdfast monitor "$@"
fi
echo "holdfast: not installed yet; this installs it: make -C '$here' install" >&2
echo "holdfast：尚未安装；安装命令：make -C '$here' install" >&2
exit 2
