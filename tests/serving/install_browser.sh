#!/usr/bin/env bash
# The browser that tests/serving/test_page.py drives: installed in CI, where that is possible. Anywhere else it is left to
# the owner of the machine. One line says what is not tested without it.
set -uo pipefail
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit

install() {
  export DEBIAN_FRONTEND=noninteractive
  timeout 120 apt-get update -qq && timeout 300 apt-get install -qq -y --no-install-recommends chromium chromium-driver
}
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && install </dev/null >/dev/null 2>&1; then
  exit
fi
echo "not tested: the page in a browser, which needs: apt-get install chromium chromium-driver"
