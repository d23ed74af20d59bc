#!/usr/bin/env bash
# Chromium with its driver, in which tests open the report's page. Without them these tests are skipped.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; then
        exit 0
    fi
fi
echo "There is no Chromium with its driver, and it could not be installed: tests of the report's page will be skipped."
