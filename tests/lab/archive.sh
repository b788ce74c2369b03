# shellcheck shell=bash
# Debian's archive, beside what the machine has of it; sourced after common.sh, not run. Whoever
# sources it has a directory $tmp for logs.
# shellcheck disable=SC2154

# APT with sources and lists of the lab's own, so that the machine's stay as they
# are: the suites below are newer than the machine and pinned low.
apt_state=$LAB_CACHE/apt
apt_options=(
    -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$apt_state/sources.list.d"
    -o "Dir::Etc::preferencesparts=$apt_state/preferences.d" -o "Dir::State::lists=$apt_state/lists"
    -o "APT::Sandbox::User=root" -o "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"
    -o "Acquire::Languages=none" -o "Dpkg::Use-Pty=0"
)
lab_apt() { local c=$1; shift; "apt-$c" -q "${apt_options[@]}" "$@"; }

archive_ready=''
archive() {
    [[ -z $archive_ready ]] || return 0
    archive_ready=1
    local codename uri security signed
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # Where this machine itself gets Debian from.
    source_of() { # suite
        # shellcheck disable=SC2016  # the variables are APT's
        apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Identifier: Packages' |
            awk -v s="$1" '$1 == s { print $2; exit }'
    }
    uri=$(source_of "$codename")
    [[ -n $uri ]] || die "APT has no source for Debian '$codename'; the lab needs a Debian machine with one"
    security=$(source_of "$codename-security")
    for signed in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg} ''; do
        [[ ! -e $signed ]] || break
    done
    mkdir -p "$apt_state"/{sources.list.d,preferences.d,lists/partial}
    {
        echo "Types: deb"
        echo "URIs: $uri"
        echo "Suites: bookworm bookworm-backports trixie trixie-backports"
        echo "Components: main"
        [[ -z $signed ]] || echo "Signed-By: $signed"
        if [[ -n $security ]]; then
            echo
            echo "Types: deb"
            echo "URIs: $security"
            echo "Suites: bookworm-security trixie-security"
            echo "Components: main"
            [[ -z $signed ]] || echo "Signed-By: $signed"
        fi
    } >"$apt_state/sources.list.d/lab.sources"
    cat >"$apt_state/preferences.d/lab" <<END
Explanation: only what is asked for by suite or version comes from elsewhere
Package: *
Pin: release n=$codename-backports
Pin-Priority: 100

Package: *
Pin: release n=$codename*
Pin-Priority: 500

Package: *
Pin: release n=*
Pin-Priority: 1
END
    say "reading the archive's package lists"
    lab_apt get update >"$tmp/update.log" 2>&1 || { cat "$tmp/update.log" >&2; die "apt-get update failed"; }
}

# The newest version of a package, and the package as NAME=VERSION to download.
newest() { # package
    lab_apt cache madison "$1" | awk -F ' *[|] *' '{ gsub(/ /, "", $2); print $2 }' | sort -V | tail -n 1
}
download() { # into-dir package=version...
    local dir=$1; shift
    (cd "$dir" && lab_apt get download "$@") >"$tmp/download.log" 2>&1 ||
        { cat "$tmp/download.log" >&2; die "could not download $*"; }
}

# From here on APT knows one suite only, and of what is installed nothing: all that a package needs is
# downloaded with it, in the versions that belong together.
of_suite_alone() { # suite package-to-prefer...
    local suite=$1 suites; shift
    mkdir "$tmp/preferences" "$tmp/sources"
    : >"$tmp/status"
    mapfile -t suites < <(printf '%s\n' "${suite%-backports}" "$suite" | sort -u)
    sed -e '/^$/,$d' -e "s/^Suites: .*/Suites: ${suites[*]}/" "$apt_state/sources.list.d/lab.sources" \
        >"$tmp/sources/lab.sources"
    if (($#)); then
        printf 'Package: %s\nPin: release n=%s\nPin-Priority: 990\n' "$*" "$suite" >"$tmp/preferences/lab"
    fi
    apt_options+=(-o "Dir::Etc::sourceparts=$tmp/sources" -o "Dir::Etc::preferencesparts=$tmp/preferences"
        -o "Dir::State::status=$tmp/status")
}
