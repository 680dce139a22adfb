{{/* The chart's name, or what overrides it. */}}
{{- define "profiler-agent.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of every object: the release's, and the chart's where that does not tell it. */}}
{{- define "profiler-agent.fullname" -}}
{{- $name := include "profiler-agent.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "profiler-agent.serviceAccountName" -}}
{{- default (ternary (include "profiler-agent.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{/* By what pods are found: never changes in a release's life. */}}
{{- define "profiler-agent.selectorLabels" -}}
app.kubernetes.io/name: {{ include "profiler-agent.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "profiler-agent.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "profiler-agent.podLabels" . }}
{{- end -}}

{{/* Without the chart's version: a new chart alone restarts no pod. */}}
{{- define "profiler-agent.podLabels" -}}
{{ include "profiler-agent.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: agent
app.kubernetes.io/part-of: profiler
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "profiler-agent.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* Whether the agent talks to the API server; empty where it does not. */}}
{{- define "profiler-agent.watchesPods" -}}
{{- $kubernetes := default dict .Values.config.kubernetes -}}
{{- if ne (toString $kubernetes.enabled) "false" -}}yes{{- end -}}
{{- end -}}

{{/* Whether the configuration lists receivers, in place of .Values.otlp; empty where it does not. */}}
{{- define "profiler-agent.listsReceivers" -}}
{{- if dig "export" "destinations" "" .Values.config -}}yes{{- end -}}
{{- end -}}

{{/* Whether the agent keeps debug files that it fetches; empty where it does not. */}}
{{- define "profiler-agent.fetchesDebugFiles" -}}
{{- if dig "symbolize" "debuginfod" "urls" "" .Values.config -}}yes{{- end -}}
{{- end -}}

{{/* Whether metrics are scraped; empty where they are not. */}}
{{- define "profiler-agent.isScraped" -}}
{{- if or .Values.metrics.annotations .Values.metrics.podMonitor.enabled -}}yes{{- end -}}
{{- end -}}

{{/* Whether the status page is told over TLS; empty where it is not. */}}
{{- define "profiler-agent.statusIsEncrypted" -}}
{{- with .Values.status.secret -}}
{{- if and .name (or .certKey .keyKey) -}}
{{- if not (and .certKey .keyKey) -}}
{{- fail "status.secret: certKey and keyKey go together" -}}
{{- end -}}
yes
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The agent's configuration file. */}}
{{- define "profiler-agent.config" -}}
{{- if hasKey .Values.config "status" -}}
{{- fail "config.status: the probes have to know it too: set status.host and status.port, and status.secret" -}}
{{- end -}}
{{- if dig "export" "spool" "" .Values.config -}}
{{- fail "config.export.spool: it needs a volume: set spool" -}}
{{- end -}}
{{- if dig "export" "endpoint" "" .Values.config -}}
{{- fail "config.export.endpoint: otlp.endpoint would win: set that" -}}
{{- end -}}
{{- $host := ternary (printf "[%s]" .Values.status.host) .Values.status.host (contains ":" .Values.status.host) -}}
{{- $status := dict "listen" (printf "%s:%v" $host (int .Values.status.port)) -}}
{{- $folder := "/var/run/secrets/profiler-agent-status" -}}
{{- with .Values.status.secret -}}
{{- if include "profiler-agent.statusIsEncrypted" $ -}}
{{- $tls := dict "cert_file" (printf "%s/%s" $folder .certKey) "key_file" (printf "%s/%s" $folder .keyKey) -}}
{{- $status = set $status "tls" $tls -}}
{{- end -}}
{{- if and .name .tokenKey -}}
{{- $status = set $status "token_file" (printf "%s/%s" $folder .tokenKey) -}}
{{- end -}}
{{- end -}}
{{- $config := dict "status" $status -}}
{{- with .Values.spool -}}
{{- if .enabled -}}
{{- $spool := dict "folder" "/var/lib/profiler-agent/spool" "mib" .mib "max_age" .maxAge -}}
{{- $config = set $config "export" (dict "spool" $spool) -}}
{{- end -}}
{{- end -}}
{{- with .Values.clusterName -}}
{{- $config = set $config "labels" (dict "extra" (dict "k8s.cluster.name" .)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $config (deepCopy .Values.config)) -}}
{{- end -}}

{{/* The ports of receivers and debuginfod servers, as a list in JSON: as listed, or of their URLs. */}}
{{- define "profiler-agent.receiverPorts" -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.receiverPorts -}}
{{- $ports = append $ports (int .) -}}
{{- end -}}
{{- if not $ports -}}
{{- $urls := list .Values.otlp.endpoint -}}
{{- if include "profiler-agent.listsReceivers" . -}}
{{- $urls = list -}}
{{- range .Values.config.export.destinations -}}
{{- $urls = append $urls .endpoint -}}
{{- end -}}
{{- end -}}
{{- if include "profiler-agent.fetchesDebugFiles" . -}}
{{- $urls = concat $urls .Values.config.symbolize.debuginfod.urls -}}
{{- end -}}
{{- range $urls -}}
{{- $authority := regexReplaceAll "^[a-z]+://" . "" | splitList "/" | first -}}
{{- $port := regexFind ":[0-9]+$" $authority | trimPrefix ":" -}}
{{- $port = default (ternary "80" "443" (hasPrefix "http://" .)) $port -}}
{{- $ports = append $ports (int $port) -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $ports) -}}
{{- end -}}
