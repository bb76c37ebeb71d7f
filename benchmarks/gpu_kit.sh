#!/usr/bin/env bash
# Gather what a GPU machine without network lacks for `python -m benchmarks.gpu`, and print the command to run there.
#
#     benchmarks/gpu_kit.sh DIR [DIFFUSERS_SCRIPT]
#
# The machine is expected to have Python 3.12, torch with CUDA, triton, transformers, accelerate, tensorboard and pytest;
# its torch is used as it is. DIR gets wheels of diffusers and of PEFT as pinned in constraints.txt, the font that the
# embedded pipeline's images are drawn with, and DIFFUSERS_SCRIPT, diffusers' examples/dreambooth/train_dreambooth_lora.py,
# if its path is given. DIR has to be a folder of this repository that git ignores, such as .gpu-kit.
set -euo pipefail

lacking=(diffusers importlib_metadata lazy-importer lazy-loader peft zipp)
most=$((30 * 1024 * 1024))
font=NotoColorEmoji.ttf
fail() { echo "gpu_kit.sh: $*" >&2; exit 2; }

[ $# -ge 1 ] && [ $# -le 2 ] || fail "got $# arguments, wanted DIR [DIFFUSERS_SCRIPT]"
[ $# -eq 1 ] || [ -f "$2" ] || fail "no file $2"
script=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
root=$PWD
kit=$(realpath -m --relative-to="$root" "$1")
case $kit in ..*|.) fail "DIR: got $1, wanted a folder inside $root" ;; esac
git check-ignore -q "$kit/x" || fail "DIR: git does not ignore $kit; add /$kit/ to .gitignore or .git/info/exclude"
others=$(find "$kit" -mindepth 1 ! -name '*.whl' ! -name "$font" ! -name train_dreambooth_lora.py -print -quit 2>/dev/null || true)
[ -z "$others" ] || fail "DIR: $kit has other files than a kit, such as $others; wanted a new folder, or an earlier kit"
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || fail "no python3"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kit"
pins=()
for name in "${lacking[@]}"; do
    pins+=("$(grep -i "^$name==" constraints.txt)") || fail "constraints.txt pins no $name"
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$work/kit" "${pins[@]}"

found=$(find ~/.local/share/fonts /usr/share/fonts -name "$font" -print -quit 2>/dev/null || true)
if [ -z "$found" ] && command -v apt-get >/dev/null; then
    (cd "$work" && apt-get download -qq fonts-noto-color-emoji >/dev/null 2>&1 && dpkg -x fonts-noto-color-emoji_*.deb .) || true
    found=$(find "$work/usr" -name "$font" -print -quit 2>/dev/null || true)
fi
if [ -n "$found" ]; then
    cp "$found" "$work/kit/$font"
else
    echo "gpu_kit.sh: no $font here, nor by apt-get: stage g (pretraining) will fail there" >&2
fi
[ -z "$script" ] || cp "$script" "$work/kit/train_dreambooth_lora.py"

size=$(du -sb "$work/kit" | cut -f1)
[ "$size" -le "$most" ] || fail "the kit has $size bytes, more than $most"
rm -rf "$kit"
mkdir -p "$(dirname "$kit")"
mv "$work/kit" "$kit"

cat <<END
$kit: $((size / 1024)) KiB. Take it along with this repository, and run there, in the repository's folder:

out=\${OUT:-gpu-results}; mkdir -p "\$out" ~/.local/share/fonts; cp $kit/$font ~/.local/share/fonts/
set -o pipefail; python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/gpu-site $kit/*.whl &&
PYTHONPATH=/tmp/gpu-site python3 -u -m benchmarks.gpu --out "\$out" --budget 480${script:+ --diffusers_script $kit/train_dreambooth_lora.py} 2>&1 | tee "\$out/log.txt"
END
