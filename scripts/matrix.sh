# scripts/test --matrix: the integration tests on every supported version of the two servers. Sourced, not run.
#
# One axis moves at a time: each Postgres with the newest nats-server, each nats-server with Debian's Postgres.
# Takes about an hour on two cores and downloads 300 MB, so it is no part of CI. Ends in a table; logs stand in
# target/matrix.

postgres_versions=(14.23.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17) # and 19; "beta" is the packages', not Postgres'
nats_server_versions=(2.10.25 2.11.11 2.12.8 2.14.5 2.14.6)        # and the newest of tools.sh; 2.14.5 forgets when a stream was created

# What does not depend on the servers' versions, or takes minutes, is left out.
suites=(alterations:: drain:: failover:: mapping:: observe:: operators_bucket:: operators_postgres:: operators_shared:: operators_streams:: flags:: park:: publication:: slot:: faults_cluster:: faults_nats:: faults_postgres:: faults_relay:: faults_streams::
  payloads:: seed:: smoke:: subjects:: surroundings:: transactions:: check_nats:: check_postgres:: check_faults:: preflight:: setup:: status:: synchronous:: tail::)

logs=$target/matrix
rows=()
failures=0

# run POSTGRES_BIN NATS_SERVER: one line of the table.
run() {
  local postgres nats log passed failed names options=()
  postgres=$("$1/postgres" --version | awk '{ print $3 }')
  nats=$("$2" --version | sed 's/.*v//')
  log=$logs/postgres-$postgres-nats-$nats.log
  # tests that say in their #[ignore] that they need it
  at_least 17 "$postgres" && options+=(--include-ignored)
  # row filters and column lists came with 15
  at_least 15 "$postgres" || options+=(--skip tables_columns_and_headers --skip the_publication_is_not_what_the_relay_needs
    --skip a_publication_that_is_narrowed --skip an_outbox_may_change --skip an_outbox_whose_rows --skip thirteen_thousand)
  at_least 18 "$postgres" || options+=(--skip an_idle_slot_is_given_up)
  # lifetimes need 2.11, and with exactly-once 2.12
  at_least 2.12 "$nats" || options+=(--skip an_event_whose_lifetime --skip an_event_that_is_refused_is_parked --skip nothing_passes_a_parked --skip a_refusal_in_a_large_window --skip a_header_may_set_the_lifetime)
  # replicated streams need 2.12 (the relay refuses them on older ones)
  at_least 2.12 "$nats" || options+=(--skip faults_cluster:: --skip eight_relays_on_one_replicated_stream)
  say "Postgres $postgres, nats-server $nats"
  local status=0
  PG_BIN=$1 NATS_SERVER_BIN=$2 RUST_TEST_THREADS=${RUST_TEST_THREADS:-2} \
    cargo test --quiet --locked --test it --test admin --no-fail-fast -- --format=pretty "${options[@]}" "${suites[@]}" >"$log" 2>&1 || status=$?
  passed=$(grep -c '^test .* \.\.\. ok$' "$log") || true
  failed=$(grep -c '^test .* \.\.\. FAILED$' "$log") || true
  names=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log" | paste -sd ' ')
  at_least 2.12 "$nats" || names="${names:+$names }(lifetimes left out)"
  at_least 2.12 "$nats" || names="${names:+$names }(faults_cluster left out)"
  at_least 17 "$postgres" || names="${names:+$names }(synchronized slots left out)"
  # also when the test program ended without a word
  [ "$status" = 0 ] && [ "$passed" -gt 0 ] || failures=$((failures + 1))
  [ "$status" = 0 ] || [ "$failed" -gt 0 ] || names="no result, see $log"
  rows+=("$(printf '%-9s %-12s %6s %6s  %s' "$postgres" "$nats" "$passed" "$failed" "$names")")
  say "$passed passed, $failed failed${names:+: $names}"
}

get_cargo
get_postgres
get_pgbouncer
for version in "$nats_server_version" "${nats_server_versions[@]}"; do
  download_nats_server "$version"
done
for version in "${postgres_versions[@]}"; do
  download_postgres "$version"
done
mkdir -p "$logs"
cargo test --quiet --locked --test it --test admin --no-run

newest=$tools/nats-server/$nats_server_version/nats-server
run "$PG_BIN" "$newest"
for version in "${postgres_versions[@]}"; do
  run "$tools/postgres/$version/bin" "$newest"
done
if download_postgres_19; then
  run "$postgres_19_bin" "$newest"
else
  say "Postgres 19 is left out: it comes from Debian's packages, as root"
fi
for version in "${nats_server_versions[@]}"; do
  run "$PG_BIN" "$tools/nats-server/$version/nats-server"
done

printf '\n%-9s %-12s %6s %6s  %s\n' Postgres nats-server passed failed
printf '%s\n' "${rows[@]}"
[ "$failures" = 0 ] || die "failed on $failures of ${#rows[@]} combinations; logs in $logs"
exit 0
