#!/usr/bin/env bash
# Does what the official image's entrypoint does, as far as tests need it:
# takes over the data directory when it is root, makes a cluster when there is
# none, then becomes the server.
set -euo pipefail

[[ ${1:-} == -* ]] && set -- postgres "$@"
[[ ${1:-} == postgres ]] || exec "$@"

if ((PG_MAJOR >= 18)) && grep -q ' /var/lib/postgresql/data ' /proc/self/mountinfo; then
    echo "Error: in 18+, these Docker images are configured to store database data in a format which is compatible with pg_ctlcluster; mount a single volume at /var/lib/postgresql" >&2
    exit 1
fi

mkdir -p "$PGDATA"
if [[ $(id -u) == 0 ]]; then
    find "$PGDATA" /var/run/postgresql \! -user postgres -exec chown postgres '{}' +
    chmod 0700 "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi

if [[ ! -s $PGDATA/PG_VERSION ]]; then
    if [[ -z ${POSTGRES_PASSWORD:-} ]]; then
        echo "Error: Database is uninitialized and superuser password is not specified." >&2
        exit 1
    fi
    user=${POSTGRES_USER:-postgres}
    database=${POSTGRES_DB:-$user}
    # shellcheck disable=SC2086  # a list of arguments, as in the official image
    initdb --username="$user" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") \
        --auth=scram-sha-256 ${POSTGRES_INITDB_ARGS:-}
    printf 'host all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    sed -i -E 's/^(local .*) scram-sha-256$/\1 trust/' "$PGDATA/pg_hba.conf"
    pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
    if [[ $database != postgres ]]; then
        psql -v ON_ERROR_STOP=1 --no-psqlrc -U "$user" -d postgres -v db="$database" \
            <<< 'CREATE DATABASE :"db";'
    fi
    pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@"
